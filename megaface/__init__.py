"""MegaFace Challenge 1: feature files, the devkit's protocol, noise lists, curves.

The words of this room:

* probe, mate, distractor: a probe (a photo of FaceScrub) looks for another photo of its identity, its mate, among the
  distractors (photos of strangers). A genuine pair is a probe and a mate; its rank is how many distractors score above
  the mate.
* game: all that the probes alone decide, before any distractor is read (`protocol`): the genuine pairs and their
  scores, the galleries of the traditional CMC, and with them the questions.
* question, threshold: every decision that needs a distractor is "how many score above s against probe a"; s is a
  threshold. `tally` answers all questions in one pass and returns a tally for each size.
* size, segment: results are wanted for the first 10, 100, ... distractors; a segment is what lies between two sizes.
* kind: a class of distractors whose norms differ by at most a factor of two, so that one bound on rounding fits all.
* block: distractors of one segment and kind that go through a matrix product together; a chunk is the probes of one.
* half score, window: the matrix product gives D, and 2 D - |p|^2 is the score but for rounding. A window is the span
  around a threshold in which rounding could decide; what falls into it is computed again in the devkit's order.
* twins: distractors with identical features; one of them is scored and counted as often as they occur.
* side: the probes or the distractors of a run of megaface_eval.py; entrants are those of both that take part under one
  treatment of the noise lists, an outcome is what came of it.
* store: the packed features of a side.

From the bottom up: `kernels`, `scores`, `windows`, `segments`, `scan`, `tally_cpu`, `tally_gpu`, `tally`, `protocol`.
"""
