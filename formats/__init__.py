"""Files of the field, one module each; nothing here knows a network or a detector.

`recordio` and `crop_sets` (training sets), `verification_bin` (`.bin` sets of pairs), `archives` and `msceleb` (what
data sets come as), `tables` (`faces.tsv`, `identities.tsv`), `embeddings` (what a model says of each crop of a set).

Words: a *record* is one entry of a RecordIO file; an *identity* is a person, its *label* the number that a training set
gives it; a *key* is a record's number in the `.idx`.
"""
