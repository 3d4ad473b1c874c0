"""Training: ranks, run folder, checkpoints, the loop, and what follows it up to the score.

Parallel forms for record scale (sharded optimiser, overlapped collectives, fault handling) join
`ranks.py` and `pgolf.optim`; the loop in `trainer.py` only asks them.
"""
