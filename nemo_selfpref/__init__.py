"""nemo_selfpref: self-play preference optimisation on Megatron and NeMo."""

import warnings

__version__ = "0.1.0"

# megatron-core says in a dozen places on import that optional kernels are absent.
warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed")
warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine).*Falling back")
warnings.filterwarnings("ignore", message=r"full scope is deprecated")
warnings.filterwarnings("ignore", message=r"When using async grad allreduce")
