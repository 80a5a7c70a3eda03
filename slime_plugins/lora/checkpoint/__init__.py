"""Sharded checkpoints of adapters: saved at one parallelism, loaded at any other.

    save.py, load.py    the two collective calls          base.py        which base an adapter belongs to
    manifest.py         ``adapter.json``, ``tensors.json``    optimizer.py   masters and moments, whole, by parameter
    storage.py          tensors in the torch_dist layout      rng.py         random states of every rank
    directory.py        ``iter_0000010``, published whole     reader.py      a checkpoint without Megatron

``directory``, ``manifest``, ``reader`` and ``storage`` need neither Megatron nor a process group.
"""
