"""Photos to crops: read a photo, find its faces, choose one, align it to 112x112, in restartable chunks.

`photos` lists and decodes, `faces` finds (`FaceFinder`, `find_faces`), `align` turns five landmarks into a crop,
`chunks` makes long work restartable and shardable, `crop_tree` writes a folder of crops beside its `faces.tsv`,
`contents` says which photos a figure was measured on.

Words: a *photo* is a file that somebody made; a *crop* is the 112x112 picture of one face, aligned to the ArcFace
template; a *window* is the photos that one worker takes through everything at once; a *chunk* is the unit that a
restart keeps or repeats; a *shard* is one machine's share of the chunks.
"""
