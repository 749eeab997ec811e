"""Judge digits in all six directions between texts, pictures and sounds, and from nothing.

`measure_digits` is a part of `python -m tokcom.evaluation.omni`, which says what is measured.
"""

from itertools import permutations

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import trange

from tokcom.evaluation.classifier import Classifier, train_classifier
from tokcom.evaluation.parts import Parts
from tokcom.processing_tokcom import write_wav
from tokcom.training.images import picture_grid

BATCH = 50  # records generated at once


def closeness(made: torch.Tensor, train: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean distances of sounds (as features) to the nearest training recording, and to other sounds
    with the same label of `labels (M,)`."""
    made = made[:, 0].flatten(1)
    train = train[:, 0].flatten(1)
    apart = torch.cdist(made, made)
    same = (labels[:, None] == labels) & ~torch.eye(len(made), dtype=torch.bool)
    return {
        "nearest training recording": torch.cdist(made, train).amin(1).mean().item(),
        "apart": apart[same].mean().item(),
    }


class StreamJudge:
    """What tells the classes of one stream: texts, pictures or sounds.

    Args:
        study: the model and the real records.
        classes: captions, one for each class.
    """

    stream: str
    word: str  # for the stream
    measure: str  # what is counted as right

    def __init__(self, study, classes: list[str]):
        self.study = study
        self.classes = classes
        train = study.data["digits"]
        self.labels = torch.tensor([[classes.index(text)] for text in train["caption"]])

    def classify(self, contents: list) -> list[int]:
        """The class of everything in `contents`; -1 for a text that is no caption."""
        raise NotImplementedError

    def details(self, contents: list, given: str, wanted: list[int], is_last: bool) -> dict:
        """What else is found of contents made from the stream `given`; some are kept as files."""
        return {}


class TextJudge(StreamJudge):
    """Captions are compared letter by letter."""

    stream = "text"
    word = "text"
    measure = "caption exact"

    def classify(self, contents: list) -> list[int]:
        return [self.classes.index(t) if t in self.classes else -1 for t in contents]

    def details(self, contents: list, given: str, wanted: list[int], is_last: bool) -> dict:
        return {"samples": contents[:10]}


class SensedJudge(StreamJudge):
    """A classifier of real pictures or sounds, trained on the training part alone, or read from
    `--judges` if it lies there as `file`."""

    file: str

    def __init__(self, study, classes: list[str]):
        super().__init__(study, classes)
        self.known = self.features(study.data["digits"][self.stream])
        self.classifier = self._train()

    def features(self, contents: list) -> torch.Tensor:
        """Pictures or sounds as the classifier sees them, `(M, 3, ...)`."""
        raise NotImplementedError

    def shape(self, features: torch.Tensor) -> torch.Tensor:
        """What distances between features are computed of."""
        return features

    def _train(self) -> Classifier:
        args = self.study.args
        file = None if args.judges is None else args.judges / f"{self.file}.safetensors"
        if file is not None and file.is_file():
            judge = Classifier([len(self.classes)])
            judge.load_state_dict(load_file(file))
            return judge.eval().to(args.device)
        judge = train_classifier(self.known, self.labels, args.epochs, args.seed, args.device)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(judge.state_dict(), file)
        return judge

    def classify(self, contents: list) -> list[int]:
        return self.classifier.classify(self.features(contents)).tolist()

    def nearest(self, contents: list) -> list[int]:
        """The class of the training record that is nearest to each picture or sound."""
        asked = self.shape(self.features(contents)).flatten(1)
        found = torch.cdist(asked, self.shape(self.known).flatten(1)).argmin(1)
        return self.labels[found, 0].tolist()


class PictureJudge(SensedJudge):
    """A class with one picture needs no classifier: its picture is compared."""

    stream = "image"
    word = "picture"
    measure = "class seen"
    file = "eye"

    def features(self, contents: list) -> torch.Tensor:
        return self.study.pixels(contents)

    def _train(self) -> Classifier | None:
        train = self.study.data["digits"]
        self.icons = None
        if len(set(map(Image.Image.tobytes, train[self.stream]))) != len(self.classes):
            return super()._train()
        self.icons = self.known[[train["caption"].index(name) for name in self.classes]]
        return None

    def classify(self, contents: list) -> list[int]:
        if self.icons is None:
            return super().classify(contents)
        asked = self.features(contents).flatten(1)
        return torch.cdist(asked, self.icons.flatten(1)).argmin(1).tolist()

    def details(self, contents: list, given: str, wanted: list[int], is_last: bool) -> dict:
        if is_last:
            keep_digits(self.study, self.classes, given, contents)
        return {}


class SoundJudge(SensedJudge):
    """Sounds are also compared with each other and with what was recorded."""

    stream = "audio"
    word = "sound"
    measure = "class heard"
    file = "ear"

    def features(self, contents: list) -> torch.Tensor:
        return self.study.sounds(contents)

    def shape(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0]  # the three channels are one and the same

    def closeness(self, contents: list, wanted: list[int]) -> dict[str, float]:
        return closeness(self.features(contents), self.known, torch.tensor(wanted))

    def details(self, contents: list, given: str, wanted: list[int], is_last: bool) -> dict:
        if given == "text" and is_last:
            keep_sounds(self.study, self.classes, contents, self.study.data["digits_test"])
        return {"closeness": self.closeness(contents, wanted)}


def build_judges(study) -> dict[str, StreamJudge]:
    """A judge for each stream."""
    classes = sorted(set(study.data["digits"]["caption"]))
    kinds = (TextJudge, PictureJudge, SoundJudge)
    return {kind.stream: kind(study, classes) for kind in kinds}


def share_equal(found: list[int], wanted: list[int]) -> float:
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


def measure_digits(study, parts: Parts) -> dict:
    """Measure the six directions between texts, pictures and sounds of classes, and from
    nothing."""
    judges = build_judges(study)
    classes = judges["text"].classes
    test = study.data["digits_test"]
    wanted = [classes.index(caption) for caption in test["caption"]]
    sensed = {name: judge for name, judge in judges.items() if isinstance(judge, SensedJudge)}
    real = {name: share_equal(judge.classify(test[name]), wanted) for name, judge in sensed.items()}
    rows = []
    sounds = [parts.measure("sounds held out", lambda: held_out_sounds(judges["audio"], wanted))]
    routes = list(permutations(judges, 2))
    # a caption in between says in a few latents what the other two must share
    routes += [(given, "text", made) for given, made in permutations(sensed, 2)]
    for route in routes:
        given, made = route[0], route[-1]
        direction = " to ".join(judges[name].word for name in route)
        row = {
            "direction": direction,
            "measure": judges[made].measure,
            "chance": 1 / len(classes),
            # what a text is made of is judged where it is read
            "real data": real.get(made, real.get(given)),
        }
        if given in sensed:
            row["nearest training record"] = parts.measure(
                f"nearest {given}",
                lambda given=given: share_equal(sensed[given].nearest(test[given]), wanted),
            )
        for scale in study.args.guidance_scales:
            key = f"guidance {scale:g}"
            found = parts.measure(
                f"{direction}, {key}",
                lambda route=route, scale=scale: measure_direction(judges, route, scale, wanted),
            )
            row[key] = found["right"]
            if "closeness" in found:
                sounds.append({"sounds": f"{direction}, {key}", **found["closeness"]})
        rows.append(row)
    row = {"direction": "from nothing", "measure": "all three agree"}
    row["chance"] = len(classes) ** -2
    nothing = []
    for scale in study.args.guidance_scales:
        key = f"guidance {scale:g}"
        found = parts.measure(
            f"from nothing, {key}", lambda scale=scale: measure_agreement(study, judges, scale)
        )
        row[key] = found["agree"]
        nothing.append({"from nothing": key, **found})
    return {"directions": [*rows, row], "sounds": sounds, "from nothing": nothing}


def held_out_sounds(judge: SoundJudge, wanted: list[int]) -> dict:
    held_out = judge.study.data["digits_test"]["audio"]
    return {"sounds": "held out", **judge.closeness(held_out, wanted)}


def measure_direction(
    judges: dict[str, StreamJudge], route: tuple[str, ...], scale: float, wanted: list[int]
) -> dict:
    """How many of the contents that are made at the end of the `route` are of the right class.

    The first stream of the route is given, and the others are made in turn.
    """
    given, *between, made = route
    judge = judges[made]
    study = judge.study
    held_out = {given: study.data["digits_test"][given]}
    contents = study.generate(made, held_out, scale, tuple(between))
    right = share_equal(judge.classify(contents), wanted)
    # pictures are kept of the direct way alone
    is_last = scale == study.args.guidance_scales[-1] and not between
    return {"right": right, **judge.details(contents, given, wanted, is_last)}


def measure_agreement(study, judges: dict[str, StreamJudge], scale: float) -> dict:
    """Of streams that are made in turn from nothing: how often they are of one class, and how often
    the rarest and the most frequent class come."""
    generator = torch.Generator().manual_seed(study.args.seed)
    count = len(study.data["digits_test"]["caption"])
    found: dict[str, list[int]] = {name: [] for name in judges}
    for start in trange(0, count, BATCH, desc="from nothing", leave=False):
        size = min(BATCH, count - start)
        made = study.pipe({}, list(found), size, study.args.steps, scale, generator=generator)
        for name, classes in found.items():
            classes += judges[name].classify(made.streams[name])
    texts, pictures, sounds = (np.array(classes) for classes in found.values())
    number = len(judges["text"].classes)
    shares = [float(np.mean(texts == i)) for i in range(number)]
    return {
        "agree": float(np.mean((texts == pictures) & (pictures == sounds))),
        "text and picture": float(np.mean(texts == pictures)),
        "text and sound": float(np.mean(texts == sounds)),
        "picture and sound": float(np.mean(pictures == sounds)),
        "captions": float(np.mean(texts >= 0)),
        "rarest class": min(shares),
        "most frequent class": max(shares),
    }


def keep_digits(study, classes: list[str], given: str, images: list[Image.Image]) -> None:
    """Draw `digits_GIVEN.png`: held-out pictures of every class above generated ones, all the first
    of their class."""
    test = study.data["digits_test"]
    first = [test["caption"].index(name) for name in classes if name in test["caption"]]
    size = study.pipe.model.codec.streams["image"].config.image_size[::-1]
    shown = [[row[i].convert("RGB").resize(size) for i in first] for row in (test["image"], images)]
    picture_grid(shown, 2).save(study.args.output_dir / f"digits_{given}.png")


def keep_sounds(study, classes: list[str], sounds: list[np.ndarray], test: dict) -> None:
    """Draw `sounds.png`, log-mel of a real recording of each class above a generated one, and write
    the generated ones as .wav files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    classes = [name for name in classes if name in test["caption"]]
    first = [test["caption"].index(name) for name in classes]
    figure, axes = pyplot.subplots(
        2, len(classes), figsize=(1.2 * len(classes), 2.6), layout="constrained"
    )
    for column, index in enumerate(first):
        for row, sound in enumerate((test["audio"][index], sounds[index])):
            axes[row, column].imshow(
                study.processor(sound)["input_features"][0],
                origin="lower",
                aspect="auto",
                cmap="magma",
            )
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(classes[column].split()[-1], fontsize=8)
        word = classes[column].split()[-1]
        rate = study.pipe.sampling_rates["audio"]
        write_wav(sounds[index], study.args.output_dir / f"{word}.wav", rate)
    axes[0, 0].set_ylabel("recorded", fontsize=8)
    axes[1, 0].set_ylabel("generated", fontsize=8)
    figure.savefig(study.args.output_dir / "sounds.png", dpi=110)
