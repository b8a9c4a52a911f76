"""One page about a run: from the results that lie in its folders to HTML and a model card.

`facts` reads what the stages wrote (`read_run`), `page` makes the HTML file, `card` the model card, `curves` the
drawings of a training. Nothing is measured here, and nothing is shown that no file says.

Words: a *run* is a folder that somebody names; a *source* is one results file in it; a *figure* is one number of a
source, with its interval and the hashes of the data and the model that it belongs to.
"""
