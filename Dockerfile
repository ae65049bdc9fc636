# The image of a GPU cluster: PyTorch, Transformer Engine and apex of NVIDIA's PyTorch image, this
# package in an environment over them, vLLM in one of its own.
#   docker build --build-arg BASE=<NVIDIA's PyTorch image, Python 3.11 or newer> -t selfpref .
# docs/cluster.md says how SLURM runs it. Versions are those of requirements/.
ARG BASE
FROM ${BASE}

# The base holds every version back by a constraint file; ours live in an environment of their own.
ENV PIP_CONSTRAINT= PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/src
COPY requirements requirements

# torch is not among the requirements, and nothing here may bring another one (--no-deps).
RUN python3 -m venv --system-site-packages /opt/selfpref \
    && /opt/selfpref/bin/pip install --no-deps -r requirements/cpu.txt

# vLLM's usual build, in the version that the CPU build was tested in; it brings its own torch.
RUN python3 -m venv /opt/rollout \
    && version="$(sed -n 's/^vllm[a-z-]*==\([0-9.]*[0-9]\).*/\1/p' requirements/rollout-cpu.txt)" \
    && test -n "$version" \
    && /opt/rollout/bin/pip install "vllm==$version"

COPY . .
RUN /opt/selfpref/bin/pip install --no-deps --editable . \
    && /opt/rollout/bin/pip install --no-deps --editable . \
    && /opt/selfpref/bin/python -c 'import apex, torch, transformer_engine.pytorch, megatron.core' \
    && /opt/selfpref/bin/selfpref --version

ENV PATH=/opt/selfpref/bin:${PATH}
WORKDIR /workspace
