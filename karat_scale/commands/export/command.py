"""`karat export`: choose the weights, the format and the output path, and write files that other tools load.

timm loads folders: one is minimal, the other is for a model hub, with a README.md that says what the model is, how it
was trained, and how to load and check it. That folder is uploaded to the Hugging Face hub, or to the server that
HF_ENDPOINT names. ONNX and torch.export are graphs that run without this package and timm. An exported model must
compute the same logits as its source.
"""

import hashlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from karat_scale.checkpoint.weights import describe_weights, preprocessing
from karat_scale.foundation.console import plural, work_display
from karat_scale.foundation.errors import RunDirectoryError, UserError, one_line
from karat_scale.foundation.files import flush_to_disk, replace_file, temporary_folder, write_atomically
from karat_scale.foundation.tables import ATTENTIONS, EXPORT_FORMATS, HUB, FormatRow, how_to_install, load
from karat_scale.models import create_model, parameter_count
from karat_scale.models.transfer import teacher_of, weights_digest
from karat_scale.recipe import AttentionConfig, ModelConfig, Recipe
from karat_scale.recipe.attention import describe_attention
from karat_scale.recipe.files import parse
from karat_scale.training.run_directory import OpenRun
from karat_scale.training.tasks.classification.distillation_teacher import build_model
from karat_scale.training.weights_file import write_weights

TRACEABLE = "reference"
"""The implementation of KArAt's operator with plain tensor operations, which a tracer can record."""


@dataclass(frozen=True)
class Source:
    """The "raw" or "ema" weights of a run's checkpoint.

    Each method raises UserError if the checkpoint has no such weights or holds another model.
    """

    run: OpenRun[Recipe]
    kind: str

    @cached_property
    def model(self) -> Any:
        """Return the model with its weights, fp32, in evaluation mode; a student comes without its teacher."""
        return self._with_weights(create_model(self.run.recipe.model, self.run.recipe.attention))

    @cached_property
    def facts(self) -> dict[str, str]:
        """Return the metadata of the model that every format holds; see `describe_weights`."""
        run = self.run
        facts = describe_weights(run.recipe, run.saved, run.chosen, self.kind, run.directory.classes())
        return {**facts, "weights_sha256": weights_digest(self.model)}

    def traceable_model(self) -> nn.Module:
        """Return the model with operations that a tracer can record; a student includes its teacher."""
        model = build_model(self.run.recipe.changed(attention__implementation=TRACEABLE), self.run.path)
        teacher = teacher_of(self._with_weights(model))
        return _WithTeacher(model, teacher.model) if teacher else model

    def _with_weights(self, model: nn.Module) -> nn.Module:
        self.run.load(model, weights=self.kind)
        return model.eval()


def write_safetensors(source: Source, path: Path) -> str:
    """Write the weights as one safetensors file of timm's names. Raises UserError as the methods of Source."""
    write_weights(source.run, source.kind, path)
    return ""


class _WithTeacher(nn.Module):
    """A student together with its teacher, so that a tracer records the teacher's weights too."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalised images."""
        logits: Tensor = self.student(images)
        return logits


def push_folder(folder: Path, repository: str, private: bool, retry: str) -> str:
    """Upload all files in one commit. Returns the repository's address.

    Args:
        private: whether a new repository is private; else its owner's default applies.
        retry: what to do to try again.

    Raises:
        UserError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by karat export")
    except Exception as error:  # of the hub's client, and of the HTTP library below it
        raise UserError(f"--push {repository}: {one_line(error)}; {retry}") from error
    return str(url)


_CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- karat_scale
---
# {title}

A model ({model}) with {attention}, {parameters:,} parameters and {classes} classes. Trained by
karat_scale {version}; these are the {kind} weights after step {step}.

| | |
|---|---|
{rows}

## Use

```python
import karat_scale.timm_models  # karat_scale must be installed, from its wheel or its clone
import timm
from PIL import Image, ImageOps

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()  # in a hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright, as viewers show it
logits = model(transform(image).unsqueeze(0))
```

`model.pretrained_cfg["label_names"]` has the names of the classes, if they are known. `recipe.yaml` is the whole
recipe. `sha256sum -c SHA256SUMS` checks that no file has changed.
"""


def model_card(facts: Mapping[str, str], model: nn.Module, title: str) -> str:
    """Return the card, made only from the metadata."""
    config, attention, preprocessing = (json.loads(facts[key]) for key in ("model", "attention", "preprocessing"))
    has_top5 = config["num_classes"] > 5
    scores = [f"{float(facts[key]):.2f} %" for key in ("top1", *(["top5"] if has_top5 else [])) if key in facts]
    rows = {
        "Resize, short side": f"{int(preprocessing['input_size'][-1] / preprocessing['crop_pct'])} px, "
        f"{preprocessing['interpolation']}",
        "Centre crop": f"{preprocessing['input_size'][-1]} px",
        "Mean, standard deviation": f"{preprocessing['mean']}, {preprocessing['std']}, of RGB in [0, 1]",
        f"{'Top-1, top-5' if has_top5 else 'Top-1'} on its validation split": ", ".join(scores)
        or "not evaluated at this step",
    }
    recipe = parse(facts.get("recipe", "{}"))
    if images := recipe.get("convert", {}).get("images"):
        how = f"its attention was matched on at most {plural(images, 'image')} and replaced"
        teacher = recipe["distill"]["from"]
        then = f", then the whole model was trained with distillation from `{teacher}`" if teacher else ""
        rows["Converted from"] = f"`{recipe['init_from']}`, {how}{then}"
    rows |= {"Recipe, SHA-256": facts["recipe_sha256"], "Weights, SHA-256": facts["weights_sha256"]}
    described, karat = describe_attention(AttentionConfig(**attention)), ATTENTIONS["karat"].words
    return _CARD.format(
        title=title,
        model=ModelConfig(**config).described,
        attention=described.replace(karat, f"[{karat}](https://arxiv.org/abs/2503.10632)"),
        parameters=parameter_count(model),
        classes=config["num_classes"],
        version=facts["karat_scale"],
        kind="averaged (EMA)" if facts["weights"] == "ema" else "raw",
        step=f"{int(facts['step']):,}",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


CONFIG, WEIGHTS, RECIPE, CARD, SUMS = "config.json", "model.safetensors", "recipe.yaml", "README.md", "SHA256SUMS"


def write_timm_folder(source: Source, path: Path) -> str:
    """Write config.json in timm's form and model.safetensors, for `timm.create_model("local-dir:...")`.

    Raises:
        UserError: the model needs a teacher, or `path` is a folder that is not empty.
        OSError: `path` cannot be written.
    """
    return _write(path, _timm_files(source))


def write_hub_folder(source: Source, path: Path) -> str:
    """Write the same with the recipe, a model card and every file's SHA-256. Raises the same as `write_timm_folder`."""
    files = {**_timm_files(source), RECIPE: source.facts["recipe"].encode()}
    files[CARD] = model_card(source.facts, source.model, source.run.recipe.run.name).encode()
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return _write(path, {**files, SUMS: sums.encode()})


def _timm_files(source: Source) -> dict[str, bytes]:
    if source.run.recipe.attention.transfer_from:
        raise RunDirectoryError(
            f"{source.run.path}: it uses its teacher's attention matrices, and this format cannot hold a teacher; "
            "use --format onnx or torch-export, without --push"
        )
    model = source.model
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    # Shared parameters once; `karat_scale.timm_models` shares them again.
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}
    return {CONFIG: (json.dumps(timm_config(source), indent=2) + "\n").encode(), WEIGHTS: save(state, source.facts)}


def timm_config(source: Source) -> dict[str, Any]:
    """Return what timm reads for `local-dir:` and `hf-hub:`: the entry point, its arguments, and the pretrained_cfg."""
    facts, model = source.facts, source.model
    attention = {**json.loads(facts["attention"]), "implementation": "auto"}  # for the reader's machine
    classes = json.loads(facts.get("classes", "[]"))
    return {
        "architecture": "karat",
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {"model": json.loads(facts["model"]), "attention": attention},
        "pretrained_cfg": {
            **preprocessing(source.run.recipe),
            "fixed_input_size": True,
            "num_classes": model.num_classes,
            **{key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")},
            **({"label_names": classes} if classes else {}),
        },
        "karat_scale": facts,
    }


def _write(path: Path, files: dict[str, bytes]) -> str:
    if path.exists() and (not path.is_dir() or path.samefile(".") or any(path.iterdir())):
        raise RunDirectoryError(f"{path} exists already; remove it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as unfinished:
        for name, content in files.items():
            write_atomically(unfinished / name, content)
        unfinished.chmod(0o755)
        unfinished.replace(path)
        flush_to_disk(path.parent)
    return f"{len(files)} files"


TOLERANCE = 1e-4
BATCHES = (1, 3)
_FIX = "it is not written; use --format safetensors, and please report this recipe"


def example_images(image_size: int, batch: int) -> Tensor:
    """Return normal noise [batch, 3, S, S], which resembles normalised images; always the same."""
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))


def check_likeness(model: nn.Module, exported: Callable[[Tensor], Tensor], image_size: int) -> float:
    """Return the largest difference of a logit over batches of several sizes.

    Raises:
        RunDirectoryError: the model fails, or the difference exceeds 1e-4 of max(largest logit, 1).
    """
    worst = 0.0
    for batch in BATCHES:
        images = example_images(image_size, batch)
        with torch.no_grad():
            expected = model(images)
            try:
                got = exported(images)
            except Exception as error:  # of the runtime
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise RunDirectoryError(f"the exported model fails on a batch of {batch}: {reason}; {_FIX}") from error
        difference = float((got - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RunDirectoryError(
                f"the exported model's logits differ by {difference:.1e} from the trained model's; {_FIX}"
            )
        worst = max(worst, difference)
    return worst


def export_run(
    run_dir: str,
    format: str | None,
    checkpoint: str,
    weights: str,
    out: str | None,
    push: str | None = None,
    private: bool = False,
) -> int:
    """Export, and print the path; returns the exit code.

    Args:
        format: one of EXPORT_FORMATS; None is safetensors.
        checkpoint: best, latest, or a name.
        weights: raw, ema, or both. For both, a run without EMA exports only raw.
        out: for one kind of weights, the file with its format's suffix, or the folder; else a directory. A directory
            has no suffix, exists already, or ends with a slash. The default is the run's own.
        push: USER/NAME of a repository on the hub, to which a hub-folder is uploaded; without `out`, it is only there.
        private: whether a new repository is private.

    Raises:
        UserError: the run or checkpoint is missing or damaged, has no EMA, or the output cannot be written.
    """
    run = OpenRun.at(run_dir, Recipe, checkpoint=checkpoint)
    kinds: Sequence[str] = [weights] if weights != "both" else ["raw", "ema"] if run.saved["has_ema"] else ["raw"]
    row = EXPORT_FORMATS[format or "safetensors"]
    if push is not None:
        if len(kinds) > 1:
            raise RunDirectoryError("--push takes one kind of weights; add --weights ema or raw")
        source = Source(run, kinds[0])
        with temporary_folder(run.path / "hub") as scratch:
            folder = Path(out).expanduser() if out else scratch / "model"
            note, size = _written(source, EXPORT_FORMATS[HUB], folder)
            print(f"uploading {source.kind} weights of {run.chosen}, {note}, {size}", flush=True)
            retry = f"{f'remove {out} and ' if out else ''}run the same command again"
            print(push_folder(folder, push, private, retry))
        return 0
    for kind in kinds:
        path = _target(out, run.path, f"{run.chosen}-{kind}", row, alone=len(kinds) == 1)
        note, size = _written(Source(run, kind), row, path)
        which = f"{kind} weights of {run.chosen}{run.store.beside(run.chosen)}"
        print(f"{path}: {which}, {size}{note and f', {note}'}")
    return 0


def _written(source: Source, row: FormatRow, path: Path) -> tuple[str, str]:
    """Write a format; returns its note and the size."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with work_display() as show:
            show(f"{source.kind} weights of {source.run.chosen}", 0, 1)
            note = load(row.place)(source, path)
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror or error}; choose another --out") from None
    files = path.iterdir() if path.is_dir() else [path]
    return note, f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _target(out: str | None, run: Path, name: str, row: FormatRow, alone: bool) -> Path:
    if out is None:
        return run / f"{name}{row.suffix}"
    suffix = Path(out).suffix
    names_it = suffix == row.suffix if row.suffix else alone
    if names_it and not alone:
        raise RunDirectoryError(f"--out {out} is one file for two kinds of weights; add --weights raw or ema")
    is_file = suffix and not out.endswith("/") and not Path(out).expanduser().is_dir()
    if is_file and not names_it and (others := [key for key, one in EXPORT_FORMATS.items() if one.suffix == suffix]):
        raise RunDirectoryError(f"--out {out} is a file of another format; add --format {others[0]}, or name a folder")
    if is_file and not names_it and alone:
        meant = Path(out).with_suffix(row.suffix)
        raise RunDirectoryError(f"--out {out} is not a {row.suffix} file; use {meant}, or {out}/ for a directory")
    path = Path(out).expanduser()
    return path if names_it else path / f"{name}{row.suffix}"


_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(source: Source, path: Path) -> str:
    """Write a graph from float32 `images` [batch, 3, S, S], normalised, to `logits` [batch, classes], for any batch.

    The metadata is in its `metadata_props`. Returns a note on what was checked with onnxruntime.

    Raises:
        UserError: a package is missing, or the model's logits differ.
        OSError: `path` cannot be written.
    """
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}; {how_to_install('export')}")
    model, facts = source.traceable_model(), source.facts
    size = source.run.recipe.model.image_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = ({0: torch.export.Dim("batch")},)
    names: Any = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            inputs = (example_images(size, 2),)
            program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, **names, verbose=False)
        assert program is not None
        proto: Any = program.model_proto
        for key, value in facts.items():
            proto.metadata_props.add(key=key, value=value)
        content = proto.SerializeToString()
    except Exception as error:  # from torch.export, onnxscript, onnx and, above 2 GB, protobuf
        reason = one_line(error.__cause__ or error)
        raise UserError(f"the model cannot be written as ONNX: {reason}; use --format torch-export") from error
    difference = check_likeness(model, onnx_session(content), size)
    replace_file(path, content)
    return f"logits within {difference:.1e} in onnxruntime, opset {proto.opset_import[0].version}"


def onnx_session(model: bytes | str) -> Callable[[Tensor], Tensor]:
    """Return an ONNX model, its bytes or its path, as a function of images that onnxruntime runs on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


FACTS = "karat_scale.json"
"""The extra file inside, which `torch.export.load(path, extra_files={FACTS: ""})` fills."""


def write_torch_export(source: Source, path: Path) -> str:
    """Export the model on normalised images [B, 3, S, S] for any B; returns a note on what was checked.

    Raises:
        UserError: the model cannot be exported, or its logits differ.
        OSError: `path` cannot be written.
    """
    model = source.traceable_model()
    size = source.run.recipe.model.image_size
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (example_images(size, 2),), dynamic_shapes=shapes)
            torch.export.save(program, buffer, extra_files={FACTS: json.dumps(source.facts)})
        except Exception as error:  # torch.export raises many kinds
            reason = one_line(error)
            raise UserError(f"the model cannot be exported: {reason}; use --format safetensors") from error
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    difference = check_likeness(model, loaded, size)
    replace_file(path, buffer.getvalue())
    return f"logits within {difference:.1e}"
