"""The pass over one block of distractors as whole-array operations, for a GPU (`tally_cpu` does the same in loops).

A row whose maximum is below all its thresholds is done: with a good model that is nearly every row. Otherwise the row
goes through a table (`windows`): some five passes over the chunk in place of a search per score.
"""

import torch
from torch import Tensor

from megaface import scores
from megaface.scan import Block, Scan
from megaface.segments import BEST

TABLE_ROWS = 128  # probes whose scores go through their tables together
DENSE_SHARE = 0.2  # from this share of uncertain scores on, scoring whole rows is cheaper than gathering pairs


class GpuWork:
    """What one worker thread needs to take blocks of distractors past all probes."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan

    def take(self, block: Block) -> None:
        """Score a block against all probes."""
        scan, self.block = self.scan, block
        self.segment, self.kind = scan.segments[block.segment], scan.kind(block.kind)
        self.windows, self.impostors = self.kind.open()
        self.gallery = torch.from_numpy(scan.read(block)).to(scan.device)
        self.squares = torch.from_numpy(scan.survey.squares[block.columns]).to(scan.device)
        self.weights = None if block.weights is None else torch.from_numpy(block.weights).to(scan.device)
        self.out = torch.empty(min(scan.rows, len(scan.probes)), len(block.columns), device=scan.device)
        self.scratch = torch.empty_like(self.out)
        for start in range(0, len(scan.probes), scan.rows):
            self.chunk(slice(start, min(start + scan.rows, len(scan.probes))))

    def add_to_segment(self) -> None:
        """Nothing is held back: every chunk is in its segment."""

    def chunk(self, rows: slice) -> None:
        """Score probes `rows` against the block and add what that tells to the segment."""
        scan, size = self.scan, rows.stop - rows.start
        half = scores.half_scores(scan.probes[rows], self.gallery, self.squares, self.out[:size], self.scratch[:size])
        top = half.amax(dim=1)
        self.count(rows, half, flat_nonzero(top >= self.windows.lowest[rows]))
        self.find_best(rows, half, top)
        which = torch.from_numpy(scan.impostors_in(rows)).to(scan.device)
        if len(which):
            self.count_impostors(which, half[which - rows.start])

    def count(self, rows: slice, half: Tensor, active: Tensor) -> None:
        """Sort the half scores of the `active` among probes `rows` into the gaps between their thresholds."""
        if not len(active):
            return
        windows, codes = self.windows, self.windows.count + 1
        with self.kind.lock:
            table = windows.table(rows)
        histogram = torch.zeros(len(half), codes, dtype=torch.int64, device=half.device)
        marked = []
        for part in active.split(TABLE_ROWS):
            everyone = int(part[-1] - part[0]) == len(part) - 1  # the usual case: no copies
            span = slice(int(part[0]), int(part[-1]) + 1)
            values = half[span] if everyone else half.index_select(0, part)
            bins = windows.to_bins(values, part + rows.start)
            codes_of_bins = (table[span] if everyone else table.index_select(0, part)).view(-1)
            code = codes_of_bins.index_select(0, bins.view(-1))
            unsure = flat_nonzero(code >= codes)
            row, column = split_flat(unsure, values.shape[1])
            value = values.reshape(-1).index_select(0, unsure)
            marked.append((part.index_select(0, row), column, value, code.index_select(0, unsure).long() - codes))
            histogram[part] = self.bincount(code, 2 * codes, len(part))[:, :codes]
        row, column, value, above = (torch.cat(some) for some in zip(*marked, strict=True))
        if len(row):
            above = self.resolve(row + rows.start, column, value, above, len(active))
            weights = None if self.weights is None else self.weights[column].double()
            counts = torch.bincount(row * codes + above, weights, minlength=histogram.numel())
            histogram += counts.long().view(histogram.shape)
        with self.segment.lock:
            self.segment.histogram[rows] += histogram.cpu().numpy()

    def bincount(self, code: Tensor, codes: int, rows: int) -> Tensor:
        """Histogram int64 [rows, codes] of each row of codes, with the distractors' multiplicities."""
        code = code.to(torch.int32).view(rows, -1)
        code += codes * torch.arange(rows, dtype=torch.int32, device=code.device)[:, None]
        weights = None if self.weights is None else self.weights.double().expand(rows, -1).reshape(-1)
        return torch.bincount(code.view(-1), weights, minlength=rows * codes).long().view(rows, codes)

    def resolve(self, probe: Tensor, column: Tensor, value: Tensor, above: Tensor, height: int) -> Tensor:
        """How many thresholds each marked half score exceeds, int64, starting from `above` that it surely does.

        The table's bins are wider than the windows: many marked scores are outside of the window itself.
        """
        windows = self.windows
        place = probe * (windows.count + 1) + above
        unsure = climb(place, value, windows.high.view(-1), windows.low.view(-1))
        if len(unsure):
            exact = self.exact(probe[unsure], column[unsure], height)
            exact_place = place[unsure]
            climb(exact_place, exact, windows.thresholds.view(-1), None)
            place[unsure] = exact_place
        return place - probe * (windows.count + 1)

    def exact(self, probe: Tensor, column: Tensor, height: int) -> Tensor:
        """Devkit scores float32 [N] of pairs that lie in `height` rows; whole rows at once when most are wanted."""
        scan = self.scan
        with self.segment.lock:
            self.segment.recomputed += len(probe)
        if len(probe) < DENSE_SHARE * height * len(self.gallery):
            return scores.pair_scores(scan.probes, self.gallery, probe, column, scan.squares, self.squares)
        rows, local = probe.unique(return_inverse=True)
        block = scores.block_scores(scan.probes[rows], self.gallery, scan.squares[rows], self.squares)
        return block[local, column]

    def find_best(self, rows: slice, half: Tensor, top: Tensor) -> None:
        """Update the five best of probes `rows`."""
        scan = self.scan
        least, width = (
            torch.from_numpy(bound).to(scan.device) for bound in self.kind.least(rows, self.segment.fifth(rows))
        )
        local = flat_nonzero(top >= least)
        if not len(local):
            return
        values = half[local]
        here = values.topk(min(BEST, values.shape[1]), dim=1).values[:, -1]
        least = torch.maximum(least[local], here.double() - width[local]) if values.shape[1] >= BEST else least[local]
        marked = flat_nonzero(values >= least[:, None])
        row, column = marked // values.shape[1], marked % values.shape[1]
        which = local + rows.start
        if scan.bounds.exact:
            score = 2 * values[row, column] - scan.squares[which[row]]
        else:
            score = self.exact(which[row], column, len(values))
        probe, place = (some.cpu().numpy() for some in (which[row], column))
        twins = None if self.block.weights is None else scan.twins
        self.segment.add_best(probe, self.block.columns[place], score.cpu().numpy(), twins)

    def count_impostors(self, which: Tensor, half: Tensor) -> None:
        """Add the scores of the ROC's probes `which` to the impostors above each genuine score."""
        scan, windows = self.scan, self.impostors
        assert windows is not None
        score = 2 * half - scan.squares[which][:, None]
        kept = flat_nonzero(score > windows.lowest)
        if not len(kept):
            return
        value = score.view(-1)[kept]
        near = flat_nonzero(windows.near.index_select(0, windows.to_bins(value)))
        if len(near):
            row, column = kept[near] // half.shape[1], kept[near] % half.shape[1]
            value[near] = self.exact(which[row], column, len(half))
        accepted = self.exceeding(value, None if self.weights is None else self.weights[kept % half.shape[1]])
        with self.segment.lock:
            self.segment.accepted += accepted.cpu().numpy()

    def exceeding(self, value: Tensor, weights: Tensor | None) -> Tensor:
        """How many of `value` (with multiplicity) are above each genuine score, int64 [U]."""
        if weights is None:
            return len(value) - torch.searchsorted(value.sort().values, self.scan.genuine, right=True)
        order = value.argsort()
        below = torch.nn.functional.pad(weights[order].cumsum(0), (1, 0))
        return below[-1] - below[torch.searchsorted(value[order], self.scan.genuine, right=True)]


def flat_nonzero(mask: Tensor) -> Tensor:
    """Flat indices int64 of true entries."""
    return mask.view(-1).nonzero().view(-1)


def split_flat(index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of flat indices into a matrix; division is slow, and most blocks are a power of two wide."""
    if width & (width - 1):
        row = index // width
        return row, index - row * width
    return index >> (width.bit_length() - 1), index & (width - 1)


def climb(place: Tensor, value: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """Move each place [N] up, in place, as long as its value exceeds `high` there; `high` rises up to an infinity.

    Returns the indices of the values that ended between `low` and `high`, where nothing is decided.
    """
    pending = torch.arange(len(place), device=place.device)
    between = []
    while len(pending):
        here, some = place.index_select(0, pending), value.index_select(0, pending)
        over = some > high.index_select(0, here)
        if low is not None:
            between.append(pending[~over & (some >= low.index_select(0, here))])
        pending = pending[over]
        place.index_add_(0, pending, torch.ones_like(pending))
    return torch.cat(between) if between else pending
