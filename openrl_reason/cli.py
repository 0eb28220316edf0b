"""``openrl-reason <command>``: a thin shell over the trainer classes. ``python -m openrl_reason <command>`` is the same thing.

Exit codes: 0 done, 1 the run failed, 2 a setting or input cannot work, 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openrl_reason.config import parse_config, split_words
from openrl_reason.environment import prepare_environment
from openrl_reason.errors import ConfigError, DataError, MissingDependencyError, OpenRLError, did_you_mean
from openrl_reason.observe.redact import redact_text


def _sft(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.sft import SFTConfig, SFTTrainer

    SFTTrainer(parse_config(SFTConfig, argv, prog=prog)).fit()


def _reinforce(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.reinforce import ReinforceConfig, ReinforceTrainer

    ReinforceTrainer(parse_config(ReinforceConfig, argv, prog=prog)).fit()


def _ppo(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.ppo import PPOConfig, PPOTrainer

    PPOTrainer(parse_config(PPOConfig, argv, prog=prog)).fit()


def _vineppo(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.vineppo import VinePPOConfig, VinePPOTrainer

    VinePPOTrainer(parse_config(VinePPOConfig, argv, prog=prog)).fit()


def _restem(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.restem import RestEMConfig, RestEMTrainer

    RestEMTrainer(parse_config(RestEMConfig, argv, prog=prog)).fit()


def _dpo(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.dpo import DPOConfig, DPOTrainer

    DPOTrainer(parse_config(DPOConfig, argv, prog=prog)).fit()


def _kto(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.kto import KTOConfig, KTOTrainer

    KTOTrainer(parse_config(KTOConfig, argv, prog=prog)).fit()


def _collect(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.collection import CollectConfig, collect_samples

    collect_samples(parse_config(CollectConfig, argv, prog=prog))


def _oreo(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.oreo import OREOConfig, OREOTrainer

    OREOTrainer(parse_config(OREOConfig, argv, prog=prog)).fit()


def _iterate(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.algorithms.iterate import IterateConfig, iterate

    iterate(parse_config(IterateConfig, argv, prog=prog))


def _evaluate(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.evaluation.evaluate import EvaluateConfig, evaluate_model

    evaluate_model(parse_config(EvaluateConfig, argv, prog=prog))


def _search(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.search.command import search_model
    from openrl_reason.search.config import SearchConfig

    search_model(parse_config(SearchConfig, argv, prog=prog))


def _analyze_values(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.evaluation.analyze_values import AnalyzeValuesConfig, analyze_values

    analyze_values(parse_config(AnalyzeValuesConfig, argv, prog=prog))


def _analyze_policy(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.evaluation.analyze_policy import AnalyzePolicyConfig, analyze_policy

    analyze_policy(parse_config(AnalyzePolicyConfig, argv, prog=prog))


def _compare(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.evaluation.compare import CompareConfig, compare_files

    files, flags = split_words(CompareConfig, argv)
    if len(files) > 2:
        raise ConfigError(f"{prog} compares two result files, not {len(files)}: {' '.join(files)}")
    named = [word for flag, file in zip(("--first", "--second"), files, strict=False) for word in (flag, file)]
    compare_files(parse_config(CompareConfig, [*named, *flags], prog=prog))


def _export(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.models.export_checkpoint import ExportConfig, export_checkpoint

    export_checkpoint(parse_config(ExportConfig, argv, prog=prog))


def _report(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.observe.report import parse_report_words, report

    report(parse_report_words(argv, prog))


def _make_model(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.models.make import MakeModelConfig, make

    make(parse_config(MakeModelConfig, argv, prog=prog))


def _inspect_data(argv: Sequence[str], prog: str) -> None:
    from openrl_reason.data.inspect_data import InspectDataConfig, inspect_data

    inspect_data(parse_config(InspectDataConfig, argv, prog=prog))


@dataclass(frozen=True)
class Command:
    """A command and its line in the help."""

    run: Callable[[Sequence[str], str], None]
    summary: str
    interrupted: str = ""
    """What Ctrl-C leaves behind."""


_GOES_ON = " With --output, the same command goes on from the samples it has."
_BLOCKS = " The same command goes on from the blocks of samples it has."
_STAGES = " The same command goes on from the last finished stage, and within a stage from what that had done."
_RESUMES = " The last complete checkpoint is intact; --run.resume continues from it."

COMMANDS = {
    "make-model": Command(_make_model, "write a small model made on the spot (or SmolLM2-135M-Instruct) as a Hugging Face folder"),
    "sft": Command(_sft, "supervised fine-tuning on solutions; rejection sampling on rewarded responses", _RESUMES),
    "reinforce": Command(_reinforce, "REINFORCE, RLOO, GRPO, Dr. GRPO, REINFORCE++ on rollouts of the policy", _RESUMES),
    "ppo": Command(_ppo, "PPO with a learned critic", _RESUMES),
    "vineppo": Command(_vineppo, "VinePPO: PPO whose values are Monte-Carlo rollouts from every reasoning step, without a critic", _RESUMES),
    "restem": Command(_restem, "RestEM, rejection sampling: fine-tuning on the policy's own right responses", _RESUMES),
    "dpo": Command(_dpo, "DPO, DPO-Positive, IPO on preference pairs: from a file, rewarded samples, or sampled first", _RESUMES),
    "kto": Command(_kto, "KTO on single responses, desirable or undesirable by their reward or label", _RESUMES),
    "oreo": Command(_oreo, "OREO: a policy and a critic learn from rewarded responses, by tokens, steps or whole responses", _RESUMES),
    "collect": Command(_collect, "rewarded samples of a model to training questions, as offline data: all, balanced, or right ones alone", _BLOCKS),
    "iterate": Command(_iterate, "rounds of collecting samples, training on them (rejection sampling, dpo, kto, oreo) and evaluating", _STAGES),
    "inspect-data": Command(_inspect_data, "what offline training would see: counts, lengths, and examples with the policy's tokens marked"),
    "evaluate": Command(_evaluate, "accuracy of a model on held-out items, with intervals", _GOES_ON),
    "search": Command(_search, "decoding guided by a critic (beams over steps, best-of-N) against plain samples of as many tokens", _GOES_ON),
    "analyze-values": Command(_analyze_values, "how accurate critics and Monte-Carlo values of states between steps are, against many rollouts"),
    "analyze-policy": Command(
        _analyze_policy, "what training has changed: distance of the weights, KL to the reference, noise of the policy gradient"
    ),
    "report": Command(_report, "one HTML page of a run, or of several: curves, alarms, trajectories to read; opens without a network"),
    "compare": Command(_compare, "paired comparison of two results of evaluate: compare A.json B.json"),
    "export": Command(_export, "turn a checkpoint into a Hugging Face folder"),
}


def usage() -> str:
    """The text of ``openrl-reason --help``."""
    lines = [f"  {name:14s} {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: openrl-reason <command> [--config FILE.yaml] [--group.setting VALUE ...]\n\ncommands:\n"
        + "\n".join(lines)
        + ("\n\nopenrl-reason <command> --help lists the settings of a command.")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Errors a user can act on print one message; a bug keeps its traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from openrl_reason import __version__

        print(f"openrl-reason {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}{did_you_mean(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    prepare_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows another one, and the run goes on
        sys.stdout.reconfigure(errors="replace")
    gc.set_threshold(100_000, 20, 20)  # a command imports half a million objects that all stay: looking for garbage among them is a quarter of it
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        COMMANDS[name].run(words[1:], f"openrl-reason {name}")
    except (ConfigError, DataError, MissingDependencyError) as error:
        print(f"error: {redact_text(str(error))}", file=sys.stderr)
        return 2
    except OpenRLError as error:
        print(f"error: {redact_text(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has enough of it (| head)
            pass
        else:
            raise  # another pipe than that of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has nowhere to go
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"interrupted: everything it started is stopped.{COMMANDS[name].interrupted}", file=sys.stderr)
        return 130
    return 0


def _as_interrupt(*_: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: actors are stopped, nothing is half-written."""
    raise KeyboardInterrupt
