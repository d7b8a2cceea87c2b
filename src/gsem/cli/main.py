"""The command line: gsem demo, train, evaluate, compare, audit, certify, report, verify, recipes, models, study, data.

The arguments are parsed first, which needs neither torch nor scipy; the module of a command is imported when it runs.
"""

import os
import signal
import sys
import threading
import warnings
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from typing import Any

from rich.console import Console

import gsem
from gsem._interrupt import Terminated, exit_code, sigterm_raises
from gsem._world import VARIABLES, World, has_launcher, world
from gsem.cli.launch import launch, processes_to_start
from gsem.cli.options import (
    STUDIES,
    AuditOptions,
    CertifyOptions,
    CompareOptions,
    DataOptions,
    DemoOptions,
    EvaluateOptions,
    ModelOptions,
    NoOptions,
    ReportOptions,
    StudyOptions,
    TrainOptions,
    VerifyOptions,
    command_line,
    parse,
    parse_recipe,
    unknown,
)
from gsem.training.recipe import Recipe
from gsem.training.recipes import RECIPES

HELP = """\
gsem: train robust image classifiers, attack them, and check the result.

usage: gsem COMMAND [OPTIONS]      (gsem COMMAND --help lists its options)

  demo       train a small GSeM network on digits, attack it, write a report
  train      train by a recipe:      gsem train gcat --data digits
  evaluate   attack a trained model: gsem evaluate runs/NAME --suite standard
  compare    compare two models:     gsem compare runs/ONE runs/OTHER
  audit      check that accuracy:    gsem audit runs/NAME --quick
  certify    certify radii in L2:    gsem certify runs/NAME --sigma 0.25
  report     write a page on a run:  gsem report runs/NAME -o report.html
  verify     check saved adversarial examples again
  recipes    list the named recipes, and what they cost
  models     list the networks
  study      compare variants over seeds: gsem study ablation
  data       list the data sets, or show what one holds: gsem data PATH

  --debug    anywhere: show the traceback of an error
  --version  print the version
"""

console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)

# For each command: the class of its options, and the function (console, options) that runs it.
COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (DemoOptions, "gsem.cli.train:demo_command"),
    "train": (TrainOptions, "gsem.cli.train:train_command"),
    "evaluate": (EvaluateOptions, "gsem.cli.evaluate:evaluate_command"),
    "compare": (CompareOptions, "gsem.cli.compare:compare_command"),
    "audit": (AuditOptions, "gsem.cli.audit:audit_command"),
    "certify": (CertifyOptions, "gsem.cli.certify:certify_command"),
    "report": (ReportOptions, "gsem.cli.report:report_command"),
    "verify": (VerifyOptions, "gsem.cli.evaluate:verify_command"),
    "recipes": (NoOptions, "gsem.cli.list:recipes_command"),
    "models": (NoOptions, "gsem.cli.list:models_command"),
    "study": (StudyOptions, "gsem.cli.study:study_command"),
    "data": (DataOptions, "gsem.cli.list:data_command"),
}
RESUMED = ("evaluate", "compare", "audit", "certify", "study")
SEVERAL = ("train", *RESUMED)
"""The commands that compute in several processes. Of the others, the first process runs, and the rest return."""


def read(command: str, words: list[str]) -> Any:
    """The options of a command, parsed from the arguments after its name.

    Raises:
        ValueError: arguments that the command does not take; the message is one line.
        SystemExit: after its help was printed.
    """
    if command not in COMMANDS:
        raise ValueError(unknown("command", command, COMMANDS))
    if command == "train":
        return _read_train(words)
    if command == "study":
        name, words = _name_first(words, "ablation")
        if name not in STUDIES:
            raise ValueError(unknown("study", name, STUDIES))
        return parse_recipe(StudyOptions, f"study {name}", words, RECIPES["gcat"], study=name)
    options = parse(COMMANDS[command][0], command, words)
    if isinstance(options, ModelOptions):
        if bool(options.model) == bool(options.named_model):
            raise ValueError(f"give one MODEL: gsem {command} MODEL, or --model MODEL")
        return replace(options, model=options.model or options.named_model, named_model="")
    return options


def _name_first(words: list[str], default: str) -> tuple[str, list[str]]:
    """The name in front of the options, or the default; and the options."""
    return (words[0], words[1:]) if words and not words[0].startswith("-") else (default, words)


def _read_train(words: list[str]) -> TrainOptions:
    name, words = _name_first(words, "")
    if name and name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    options: TrainOptions = parse_recipe(TrainOptions, "train", words, RECIPES[name or "gcat"])
    if options.config is not None and (name or options.resume):
        raise ValueError(f"--config is a recipe of its own: leave out {name or '--resume'}")
    if options.resume is None:
        return options
    former = import_module("gsem.training.run").resume_recipe(options.resume)
    options = parse_recipe(TrainOptions, "train", words, former)
    _refuse_changes(options, former, name)
    return replace(options, recipe=replace(former, data=options.recipe.data, data_path=options.recipe.data_path))


def _refuse_changes(o: TrainOptions, former: Recipe, name: str) -> None:
    """Raise a ValueError if what is given beside --resume is not what the run has. Its data may lie elsewhere now."""
    # (The schedule that --epochs scaled is not a change of its own.)
    now, then = o.recipe.to_dict(), former.scaled(o.recipe.epochs).to_dict() | {"epochs": former.epochs}
    place = ("data", "data_path")
    changed = [f"--{key.replace('_', '-')}" for key in now if now[key] != then[key] and key not in place]
    changed += [f"the recipe {name}"] if name not in ("", former.name) else []
    changed += ["--out"] if o.out not in (None, o.resume) else []
    if changed:
        raise ValueError(
            f"{', '.join(changed)} cannot be given with --resume: {o.resume} resumes with its own recipe "
            f"({former.name}), whose schedule spans its {former.epochs} epochs. For other settings start a new run "
            f"from its weights: {command_line('train', init_from=str(o.resume))} …"
        )


def _warning(message: Warning | str, *where: Any) -> None:
    errors.print(f"gsem: warning: {' '.join(str(message).split())}", soft_wrap=True)


def main(words: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0; 2 for an error (one line on stderr), 130 Ctrl-C, 143 SIGTERM.

    Of several processes, the first prints; an error is printed by one of them.
    """
    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        place = world()
    except ValueError as error:
        return _refused(error)
    console.quiet = errors.quiet = place.rank > 0
    if place.size > 1:  # before torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(HELP)
        return 0 if words else 2
    if words[0] == "--version":
        console.print(f"gsem {gsem.__version__} (torch {version('torch')})")
        return 0
    if place.size > 1 and words[0] in COMMANDS and words[0] not in SEVERAL:
        if place.rank > 0:
            return 0
        place = _alone()
    try:
        return _run(words, place, debug)
    except KeyboardInterrupt as stopped:
        kept = "; what is finished is kept: the same command resumes from there" if words[0] in RESUMED else ""
        return _ended(str(stopped) or f"stopped{kept}", stopped, exit_code(stopped))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _refused(error)


def _run(words: list[str], place: World, debug: bool) -> int:
    command, *rest = words
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if place.rank > 0 else nullcontext():
        options = read(command, rest)
    processes = processes_to_start(options, place)
    if processes > 1:
        return launch([*words, *(["--debug"] if debug else [])], processes)
    module, function = COMMANDS[command][1].split(":")
    with warnings.catch_warnings(), sigterm_raises():
        warnings.showwarning = _warning  # type: ignore[assignment]  # (the line of code that warned is not shown)
        if place.size > 1:
            _join(place).hint = "The same command resumes from what is finished" if command in RESUMED else ""
        getattr(import_module(module), function)(console, options)
    return 0


def _join(place: World) -> Any:
    try:
        return import_module("gsem.distributed").current()
    except ValueError:
        if place.rank == 1 and not has_launcher():
            errors.quiet = False  # the first process may be the one that is missing
        raise


def _alone() -> World:
    """From here on, this process is the only one: for commands that compute in one process."""
    for name in (*VARIABLES, "SLURM_STEP_NUM_TASKS"):
        os.environ.pop(name, None)
    return world()


def _refused(error: Exception) -> int:
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    text = " ".join(str(error).split()) or type(error).__name__
    return _ended(f"gsem: {kind}{text}", error, 2)


def _ended(text: str, cause: BaseException, code: int) -> int:
    """Print why the command ends, unless another process prints it. Returns the exit code."""
    distributed = sys.modules.get("gsem.distributed")  # (what is refused before anything is computed needs no torch)
    processes = None if distributed is None else distributed.joined()
    if distributed is None or processes is None or not processes.several:
        errors.print(text, soft_wrap=True)
        return code
    # The end of the others must not tear this one.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # torch's error, or torchrun's SIGTERM, may come from the end of another process, which is printed already.
    if type(cause) in (RuntimeError, Terminated, distributed.ProcessLost):
        processes.lost_soon()
    elsewhere = processes.lost is not None or isinstance(cause, distributed.OtherProcessFailed)
    if not elsewhere and processes.speaks_for_all(distributed.END):
        errors.quiet = False
        errors.print(text, soft_wrap=True)
    processes.leave(text, printed=True)
    return code


def script() -> None:
    """The console script."""
    sys.exit(main())
