"""Judge digits in all six directions between texts, pictures and sounds, and from nothing.

`measure_digits` is a part of `python -m tokcom.evaluation.omni`, which says what is measured.
"""

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import trange

from tokcom.evaluation.images import Classifier, train_classifier
from tokcom.evaluation.parts import Parts
from tokcom.processing_tokcom import write_wav
from tokcom.training.images import picture_grid

BATCH = 50  # records generated at once
MEASURES = {"text": "caption exact", "image": "class seen", "audio": "class heard"}
WORDS = {"text": "text", "image": "picture", "audio": "sound"}


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


class Judges:
    """Classifiers of real digits: `see` names the class of pictures, `hear` that of sounds.

    They are trained on the training part alone, or read from `--judges` if they lie there.
    """

    def __init__(self, study):
        train = study.data["digits"]
        self.study = study
        self.classes = sorted(set(train["caption"]))
        self.labels = torch.tensor([[self.classes.index(t)] for t in train["caption"]])
        # a class with one picture needs no classifier: it is compared
        self.icons = None
        if len({picture.tobytes() for picture in train["image"]}) == len(self.classes):
            first = [train["caption"].index(name) for name in self.classes]
            self.icons = train["pixels"][first]
        self.heard = study.sounds(train["audio"])
        self.ear = self._judge("ear", self.heard)
        self.eye = None if self.icons is not None else self._judge("eye", train["pixels"])

    def _judge(self, name: str, inputs: torch.Tensor) -> Classifier:
        args = self.study.args
        file = None if args.judges is None else args.judges / f"{name}.safetensors"
        if file is not None and file.is_file():
            judge = Classifier([len(self.classes)])
            judge.load_state_dict(load_file(file))
            return judge.eval().to(args.device)
        judge = train_classifier(inputs, self.labels, args.epochs, args.seed, args.device)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(judge.state_dict(), file)
        return judge

    def see(self, pixels: torch.Tensor) -> list[int]:
        if self.icons is not None:
            return torch.cdist(pixels.flatten(1), self.icons.flatten(1)).argmin(1).tolist()
        return self.eye.classify(pixels).tolist()

    def hear(self, features: torch.Tensor) -> list[int]:
        return self.ear.classify(features).tolist()

    def classify(self, stream: str, contents: list) -> list[int]:
        """The class of generated texts, pictures or sounds; -1 for a text that is no caption."""
        if stream == "text":
            return [self.classes.index(t) if t in self.classes else -1 for t in contents]
        if stream == "image":
            return self.see(self.study.pixels(contents))
        return self.hear(self.study.sounds(contents))

    def nearest(self, stream: str, contents: list) -> list[int]:
        """The class of the training record that is nearest to each picture or sound."""
        train = self.study.data["digits"]
        known = train["pixels"] if stream == "image" else self.heard[:, 0]
        if stream == "image":
            asked = self.study.pixels(contents)
        else:
            asked = self.study.sounds(contents)[:, 0]
        found = torch.cdist(asked.flatten(1), known.flatten(1)).argmin(1)
        return self.labels[found, 0].tolist()


def share_equal(found: list[int], wanted: list[int]) -> float:
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


def measure_digits(study, parts: Parts) -> dict:
    """Measure the six directions between texts, pictures and sounds of classes, and from nothing."""
    judges = Judges(study)
    test = study.data["digits_test"]
    wanted = [judges.classes.index(caption) for caption in test["caption"]]
    real = {
        "image": share_equal(judges.see(test["pixels"]), wanted),
        "audio": share_equal(judges.hear(study.sounds(test["audio"])), wanted),
    }
    rows = []
    sounds = [parts.measure("sounds held out", lambda: held_out_sounds(judges, wanted))]
    for given in ("text", "image", "audio"):
        for made in ("text", "image", "audio"):
            if made == given:
                continue
            row = {
                "direction": f"{WORDS[given]} to {WORDS[made]}",
                "measure": MEASURES[made],
                "chance": 1 / len(judges.classes),
                # what a text is made of is judged where it is read
                "real data": real[given] if made == "text" else real[made],
            }
            if given != "text":
                row["nearest training record"] = parts.measure(
                    f"nearest {given}",
                    lambda given=given: share_equal(judges.nearest(given, test[given]), wanted),
                )
            for scale in study.args.guidance_scales:
                key = f"guidance {scale:g}"
                found = parts.measure(
                    f"{row['direction']}, {key}",
                    lambda given=given, made=made, scale=scale: measure_direction(
                        judges, given, made, scale, wanted
                    ),
                )
                row[key] = found["right"]
                if made == "audio":
                    sounds.append({"sounds": f"{row['direction']}, {key}", **found["closeness"]})
            rows.append(row)
    nothing = parts.measure("from nothing", lambda: measure_agreement(judges))
    row = {"direction": "from nothing", "measure": "all three agree"}
    row |= {"chance": len(judges.classes) ** -2, "guidance 1": nothing["agree"]}
    return {"directions": [*rows, row], "sounds": sounds, "from nothing": nothing}


def held_out_sounds(judges: Judges, wanted: list[int]) -> dict:
    held_out = judges.study.sounds(judges.study.data["digits_test"]["audio"])
    return {"sounds": "held out", **closeness(held_out, judges.heard, torch.tensor(wanted))}


def measure_direction(
    judges: Judges, given: str, made: str, scale: float, wanted: list[int]
) -> dict:
    """How many of the `made` streams that are generated from `given` are of the right class."""
    study = judges.study
    test = study.data["digits_test"]
    contents = study.generate(made, {given: test[given]}, scale)
    found = {"right": share_equal(judges.classify(made, contents), wanted)}
    is_last = scale == study.args.guidance_scales[-1]
    if made == "audio":
        features = study.sounds(contents)
        found["closeness"] = closeness(features, judges.heard, torch.tensor(wanted))
        if given == "text" and is_last:
            keep_sounds(study, judges.classes, contents, test)
    if made == "image" and is_last:
        keep_digits(study, judges.classes, given, contents)
    if made == "text":
        found["samples"] = contents[:10]
    return found


def measure_agreement(judges: Judges) -> dict:
    """Of streams that are generated together from nothing: how often they are of one class, and how
    often each class comes."""
    study = judges.study
    generator = torch.Generator().manual_seed(study.args.seed)
    count = len(study.data["digits_test"]["caption"])
    found = {"text": [], "image": [], "audio": []}
    for start in trange(0, count, BATCH, desc="from nothing", leave=False):
        size = min(BATCH, count - start)
        made = study.pipe({}, list(found), size, study.args.steps, generator=generator).streams
        for stream, classes in found.items():
            classes += judges.classify(stream, made[stream])
    texts, pictures, sounds = (np.array(found[name]) for name in found)
    return {
        "agree": float(np.mean((texts == pictures) & (pictures == sounds))),
        "text and picture": float(np.mean(texts == pictures)),
        "text and sound": float(np.mean(texts == sounds)),
        "picture and sound": float(np.mean(pictures == sounds)),
        "captions": float(np.mean(texts >= 0)),
        "of each class": [float(np.mean(texts == i)) for i in range(len(judges.classes))],
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
