"""What is wrong with a training set: labels, duplicates, and people of the test sets.

`centres` finds the middle of each identity although a third of its crops may be wrong, and the nearest other identity
of each crop; `duplicates` finds the same photo twice; `measures` looks at each crop on its own; `findings` draws the
conclusions; `report` writes tables, sheets and a page to look at; `selection` (in `formats`) is what training reads.

Words: *own* is the cosine of a crop and its identity's centre (made without that crop), *other* that of the nearest
other centre; *trusted* crops are those a centre is made of; the *error rate* is the share of right crops, people or
pairs that may be called wrong by chance, and every threshold comes from the set's own distributions at that rate.
"""
