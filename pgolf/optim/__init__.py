"""Muon and AdamW parameter groups, schedules by share of the run, weight averaging.

The form for record scale (parameter banks, sharded momentum, overlapped collectives) belongs here
too, as a sibling of `muon.py` with the same interface.
"""

from pgolf.optim.muon import Muon

__all__ = ["Muon"]
