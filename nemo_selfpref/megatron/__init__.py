"""The network on megatron-core: device, parallel layout, attention, training step, decoding."""
