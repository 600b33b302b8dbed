"""DeepSeek-V3 and R1 training on PyTorch Lightning, with money as part of training.

Layers, each importing only from those above it in this list::

    config, flops, ops                      shapes, closed forms, pure tensor functions
    nn                                      modules whose forward is the paper's equations
    models, losses, optim, data, cost       assembly, objectives, optimisers, tokens, money
    rl                                      tasks, rewards, advantages
    generation                              sampling
    training                                LightningModules and the checkpoint store
    callbacks                               when things happen
    cli                                     the ds-lightning command

Words used in the shapes of signatures: ``batch seq tokens hidden heads nope rope v_dim q_rank kv_rank experts topk
groups ffn vocab rows sequences samples``.
"""

__version__ = "0.1.0"
