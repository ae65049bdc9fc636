"""The network on megatron-core: device, parallel layout, attention, training step, decoding."""

import warnings

# What is missing and what that costs is said once, by us, not by a dozen imports.
warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed")
warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine).*Falling back")
warnings.filterwarnings("ignore", message=r"When using async grad allreduce")
