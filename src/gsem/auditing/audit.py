"""The audit: runs the checks one after the other and returns them with the verdict."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gsem._env import exact_float32, out_of_memory_names, require_float64
from gsem._fingerprint import data_fingerprint, model_fingerprint
from gsem._lock import locked
from gsem.attacks._types import Norm
from gsem.attacks.own import listed
from gsem.attacks.suite import SUITES, AttackSpec, suite
from gsem.auditing import binarization, blackbox, gradient, indicators, noise, sweeps
from gsem.auditing.check import Audit, Figures, RegisteredCheck
from gsem.auditing.context import PRIMARY, AuditContext, fold_quietly
from gsem.auditing.partial import Finished, Partial, refuse_to_overwrite
from gsem.auditing.progress import Progress, ProgressReporter, planned
from gsem.auditing.shares import lowest
from gsem.auditing.verdict import verdict
from gsem.distributed import current
from gsem.evaluation.evaluate import undefended
from gsem.evaluation.partial import finished_parts, refuse_differences
from gsem.evaluation.result import with_ending
from gsem.nn.contract import ImagesLike, LabelsLike, checked, plain_logits
from gsem.nn.predict import BATCH, is_stochastic

# The white-box attacks whose result is audited by default.
ATTACKS = "apgd:steps=100,apgd:steps=100:loss=margin,apgd:steps=100:targets=9"
QUICK = "apgd:steps=50:eot=5,apgd:steps=50:loss=margin:eot=5,apgd:steps=20:targets=9:eot=3"
DRAWS, QUICK_DRAWS = 100, 20

# All checks by name, as they are made and shown: module by module, in the order in which each module has them.
MODULES = (noise, gradient, indicators, binarization, sweeps, blackbox)
CHECKS = {c.name: c for module in MODULES for c in vars(module).values() if isinstance(c, RegisteredCheck)}
CHECKS["noise"] = CHECKS.pop("noise")  # last: it repeats the audited attacks


@exact_float32()
def audit(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    attacks: str | Sequence[AttackSpec | str] | None = None,
    *,
    eps: float | str,
    norm: Norm = "Linf",
    draws: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    only: Sequence[str] | None = None,
    quick: bool = False,
    source_models: Mapping[str, nn.Module] | None = None,
    surrogate: nn.Module | None = None,
    save: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Audit:
    """Which accuracy of `model` may be quoted: twelve checks, the lowest accuracy found, and the verdict.

    The claimed accuracy is the worst case over `attacks`. Each check measures one way in which it could be too high.
    Where one is flagged, the attack is repaired, the accuracy is measured again, and the check is asked again of the
    repaired attack. The accuracy found is the worst case over all attacks of the audit. docs/audit.md describes every
    check, its threshold and its paper, and the rules of the verdict.

    Several processes (started by torchrun, for instance) share the batches of the audited attacks: all of them call
    this function with the same arguments, and all return the same audit. The first one saves it and calls
    `on_progress`.

    Args:
        model: images [b, c, h, w] in [0, 1] → logits, in eval mode. It is not changed. It may have no gradient, and
            return integers: scores, or classes [b].
        x, y: images in [0, 1], and their labels, tensors or numpy arrays. The gradient check needs at least 100.
        attacks: as `evaluate` takes them, at least one of them pgd, apgd, cw, fgsm, square or rays. APGD on
            cross-entropy, on the margin and towards nine targets by default.
        eps: radius of the threat model, in the unit of the images.
        draws: scoring draws of a stochastic model, for each point. Default: 100, with `quick` 20.
        seed: of every random stream used; the caller's random state is not changed.
        batch_size: images attacked at once.
        only: names of the checks to make; default: all. If some are left out, the verdict is INCOMPLETE, or
            OVERSTATED where they find a lower accuracy.
        quick: other defaults, with fewer steps, draws and queries: minutes on a CPU for a small network. Attacks and
            draws that are given are used as they are.
        source_models: other models, by name, whose adversarial examples are tried on this one. A model with GSeMs is
            always among them twice: without its noise, and without its quantiser too.
        surrogate: a model that the attacks differentiate instead of `model`, as in BPDA or with a substitute network.
        save: where the audit goes (`Audit.save`). Each finished check is kept beside it meanwhile, in a folder
            `….unfinished`, and the same call resumes after the last of them, to the same audit.
        about: more entries for the audit's metadata. A "command" among them is shown as the one that repeats the audit,
            and with `--only NAME` a single check; "evaluate", with `--attacks` behind it, as the one that reaches the
            accuracy found.
        on_progress: called with a `Progress` while it runs.

    Raises:
        ValueError: an unknown check, attack or option, arguments out of range, labels that the model does not have;
            at `save`, an audit of another question, finished or not.
        Locked: another process audits into `save`. OSError: it cannot be written.
    """
    processes = current()
    with processes.first_warns(), processes.together(), out_of_memory_names(batch_size):
        names = list(CHECKS) if only is None else list(only)
        for name in names:
            if name not in CHECKS:
                raise ValueError(f"check {name!r} is unknown: it is one of {', '.join(CHECKS)}")
        draws = (QUICK_DRAWS if quick else DRAWS) if draws is None else draws
        if not len(x):
            raise ValueError("there are no images to audit on")
        model, x, y, eps = checked(model, x, y, eps=eps, norm=norm, draws=draws, batch_size=batch_size)
        require_float64(x.device, "an audit")
        if norm == "Linf" and eps > 1:
            raise ValueError(f"eps = {eps:g}, but images lie in [0, 1]: it must be at most 1 (8/255, not 8)")
        source_models = {name: plain_logits(source, x, y) for name, source in (source_models or {}).items()}
        surrogate = None if surrogate is None else plain_logits(surrogate, x, y)
        chosen, stochastic = audited(attacks, quick=quick), is_stochastic(model, x[:batch_size])
        reporter = ProgressReporter(on_progress if processes.first else None)
        every = undefended(model) | source_models
        ctx = AuditContext(
            model=model,
            x=x,
            y=y,
            attacks=chosen,
            eps=eps,
            norm=norm,
            seed=seed,
            draws=draws if stochastic else 1,
            batch_size=batch_size,
            stochastic=stochastic,
            quick=quick,
            source_models={name: fold_quietly(source) for name, source in every.items()},
            surrogate=surrogate,
            on_progress=reporter.report,
            on_step=None if reporter.on_progress is None else reporter.on_step,
        )
        question = _question(ctx, only, every)
    refuse_differences(question)

    def made(partial: Partial | None) -> Audit:
        ctx.partial = partial
        with out_of_memory_names(batch_size):
            parts = _finished(ctx, names, reporter)
            figures = ctx.figures() if ctx.attacked else None
        checks = tuple(part.check for part in parts)
        word, reason = verdict(checks, complete=set(names) == set(CHECKS), figures=figures)
        found = Audit(checks, word, reason, _metadata(ctx, question, parts, figures, about))
        return processes.from_first(lambda: found)

    with processes.first_warns():
        return made(None) if save is None else _saved(Path(save), question, x.device, made)


def _saved(save: Path, question: dict[str, Any], device: torch.device, made: Callable[[Partial], Audit]) -> Audit:
    """The audit, made with its finished checks kept beside `save`, and saved there."""
    out, processes = with_ending(save, ".json"), current()
    instead = "wait for its end, or choose another --out"
    with ExitStack() as held:

        def opened() -> Partial:
            out.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out.with_name(f".{out.name}.lock"), f"auditing into {out}", instead))
            refuse_to_overwrite(out, question)
            return Partial(out, question)

        with finished_parts(opened) as partial:
            partial.device = device
            audit = made(partial)
            with processes.together():
                if processes.first:
                    audit.save(out)
    return audit


def _question(ctx: AuditContext, only: Sequence[str] | None, source_models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """All that decides the audit, and more of its metadata.

    Args:
        source_models: those of the transfer attack, not folded.
    """
    return {
        "fingerprint": model_fingerprint(ctx.model) | data_fingerprint((ctx.x, ctx.y)),
        **{name: getattr(ctx, name) for name in ("eps", "norm", "draws", "seed", "quick", "batch_size")},
        "only": None if only is None else list(only),
        "options": {ctx.label(a): _plain(ctx.options(a)) for a in ctx.attacks},
        "source_models": {name: model_fingerprint(source) for name, source in source_models.items()},
        "surrogate": None if ctx.surrogate is None else model_fingerprint(ctx.surrogate),
        "torch": torch.__version__,
        "device": ctx.x.device.type,
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an attack as JSON takes them; a function by its name."""
    known = (int, float, str, bool, type(None))
    return {k: v if isinstance(v, known) else getattr(v, "__qualname__", type(v).__name__) for k, v in options.items()}


def _finished(ctx: AuditContext, names: Sequence[str], reporter: ProgressReporter) -> list[Finished]:
    """Every check, made or read, in the order of their names."""
    ctx.earlier.clear()
    kept = {name: None if ctx.partial is None else ctx.partial.read(name) for name in names}
    reporter.expects(planned(ctx, names), {name: part.seconds for name, part in kept.items() if part is not None})
    for name in names:
        reporter.begins(name)
        part = kept[name]
        if part is None:
            started = time.monotonic()
            ctx.tried.clear()
            check = CHECKS[name](ctx)
            tried = (ctx.tried, [(follows, shares) for follows, shares in ctx.tried if follows])
            worst = (lowest([shares for _, shares in each]) if each else None for each in tried)
            part = current().from_first(partial(Finished, check, time.monotonic() - started, *worst))
            if ctx.partial is not None:
                ctx.partial.write(part)
        ctx.earlier.append(part)
        reporter.ended(part, earlier=kept[name] is not None)
    return ctx.earlier


def audited(attacks: str | Sequence[AttackSpec | str] | None, *, quick: bool) -> list[AttackSpec]:
    """The attacks by name, AutoAttack by its parts.

    Raises:
        ValueError: an audit cannot repeat them.
    """
    if attacks is None:
        attacks = QUICK if quick else ATTACKS
    found: list[AttackSpec] = []
    for attack in suite(attacks) if isinstance(attacks, str) and attacks in SUITES else listed(attacks):
        if not isinstance(attack, AttackSpec):
            raise ValueError(f"an audit repeats attacks with other budgets: it takes those of gsem, not {attack!r}")
        found += _parts(attack) if attack.name == "autoattack" else [attack]
    found = [a for a in found if a.name != "clean" and a.bounded]
    if not any(a.name in (*PRIMARY, "square", "rays") for a in found):
        raise ValueError(f"an audit needs at least one of the attacks {', '.join(PRIMARY)}, square, rays")
    return found


def _parts(attack: AttackSpec) -> list[AttackSpec]:
    steps = {key: value for key, value in attack.options.items() if key in ("steps", "eot")}
    boxed = {key: value for key, value in attack.options.items() if key in ("queries", "eot")}
    targeted = [AttackSpec(name, steps | {"targets": 9}) for name in ("apgd", "fab")]
    return [AttackSpec("apgd", steps), *targeted, AttackSpec("square", boxed)]


def _metadata(
    ctx: AuditContext,
    question: Mapping[str, Any],
    parts: Sequence[Finished],
    figures: Figures | None,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "images": len(ctx.x),
        **question,
        "attacks": [ctx.label(a) for a in ctx.attacks],
        "stochastic": ctx.stochastic,
        "classes": ctx.classes,
        "clean": ctx.accuracy(ctx.clean).as_accuracy(),
        "machine": platform.machine(),
        "device": str(ctx.x.device),
        "tf32": False,
        "seconds": round(sum(part.seconds for part in parts), 1),
        **(dict(about) if about is not None else {}),
    }
    if figures is not None:  # (if no check needed the attacks, they did not run)
        metadata |= {
            "claimed": None if figures.claimed is None else figures.claimed.as_accuracy(),
            "found": figures.found.as_accuracy(),
            "gap": None if figures.gap is None else figures.gap._asdict(),
            "reached_by": figures.attacks,
        }
    return metadata
