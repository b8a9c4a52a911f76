"""People who do not exist: head geometry, skin, hair, clothes and a ray tracer that photographs them.

`head` reads the freely licensed mesh data, `parameters` draws who a person is and how a photo of them varies, `skin`
paints, `hair` grows, `props` makes what is worn or held in front, `render` traces and `photo` does what a camera does
afterwards; `dataset` writes files. Nothing outside `synthesize.py` imports this package, so its two extra
dependencies stay optional.
"""
