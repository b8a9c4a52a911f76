"""Files of the field, one module each; nothing here knows a network or a detector.

`crop_sets`, `recordio` and `crop_files` (training sets, as `Crops`), `verification_bin` (`.bin` sets of pairs),
`archives` with `zips`, `msceleb`, `webdataset`, `label_list` and `parquet` (what data sets come as), `tables`
(`faces.tsv`, `identities.tsv`), `embeddings` (what a model says of each crop of a set), `names` (names that others
chose: the check that all of them pass).

Words: a *record* is one entry of a RecordIO file; an *identity* is a person, its *label* the number that a training set
gives it; a *key* is a record's number in the `.idx`; a *space* is the set of people within which a name is meant. A
WebDataset *shard* is a tar of a set, and has nothing to do with a machine's share of work (`cropping.chunks.Shard`).
"""
