"""One command for a machine with one GPU: is it right there, and how fast is it?

    python -m benchmarks.gpu_check              from the root of a checkout
    python -m benchmarks.gpu_check --dry-run    what would run here, how long, what is left out
    python -m benchmarks.gpu_check --toy        every check that a CPU can do, at a tiny size

Needs no installation of this package, only what each check imports; what cannot be imported is
said and left out. Each check is a process of its own with a time limit, and its results are on
disk as soon as they are known.
"""
