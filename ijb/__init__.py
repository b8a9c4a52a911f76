"""IJB-B, IJB-C and TinyFace: protocols that compare sets of photos, and faces of twenty pixels.

`lists` reads the official files, `crops` cuts and embeds the photos they name, `templates` pools features, `one_to_one`
and `one_to_many` say what the templates are worth, `tinyface` is the other protocol, `report` writes it all down, and
`kernels` holds the compiled loops.

Words: a *template* is a set of images of one person, the unit that is compared; a *media* is what some of its images
share (a video, or one still), and counts once however many images it has; a *treatment* says how images become a
template: N, features of length 1 before pooling; D, weighted by the detector's score; F, mirror image added.
Every figure comes twice: as the field's public code prints it, and with an error rate that is not exceeded.
"""
