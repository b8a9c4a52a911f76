"""Is it the same person? Sets of pairs, what a model says of them, and what that is worth.

`sets` opens them (`open_set`), `features` embeds them (`verify`), `metrics` turns cosines into figures (NumPy alone),
`decision` gives one pair's answer, `report` writes tables, curves and sheets, `lfw` finds photos and their faces,
`pairs` reads lists of pairs of any kind, `scores` keeps the cosines beside a results.json. `intervals` says how sure a
figure is, `groups` and `attributes` whether some people are failed more than others. For folders of people: `people`
embeds them, `all_pairs` counts all their pairs, `identification` plays galleries and probes, `hold_out` sets people
aside before training.

Words: a *pair* is two crops and the truth; a *fold* is a part of the pairs on which the threshold of the others is
tested; *FAR* and *TAR* are the shares of different and of same pairs that a threshold accepts.
"""
