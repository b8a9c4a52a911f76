"""What only `train.py` imports: losses and head, teacher, schedules, augmentation, checkpoints ...

Words: a *centre* is the head's unit vector of one identity; the *margin* is what is added to the angle between a crop
and its own centre; *scale* is the factor on all cosines; a *rank* is one process of a run; a *step* is one update of
the weights, over the crops of all ranks.
"""
