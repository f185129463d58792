"""The `nystrom` command: every subcommand is a dataclass, every flag one of its fields."""

import sys
from dataclasses import dataclass
from typing import Annotated

from nystrom.runs import leave_together

INSTALL = "pip install 'nystrom[train]'"
PROGRAM = "nystrom"
ABOUT = "Linear-cost attention for Transformers that read long sequences."


def main() -> None:
    """Parse the command line and run the subcommand.

    A user's mistake (an unknown flag, unreadable data, a setting out of range) prints its reason and exits with 2.
    """
    try:
        run(sys.argv[1:])
        leave_together()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(PROGRAM):
            raise
        sys.exit(f"{PROGRAM}: this command needs the package {error.name}: {INSTALL}")
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: list[str]) -> None:
    """Parse `arguments` and run the subcommand that they name."""
    import tyro
    from tyro.conf import OmitSubcommandPrefixes, subcommand

    from nystrom import demo
    from nystrom.bench import (
        error,
        front,
        growth,
        memory,
        models,
        plan,
        plot,
        ranks,
        scale,
        sentences,
        speed,
        steps,
        synthetic,
        table,
    )
    from nystrom.inspect import command as inspection
    from nystrom.lra import table as lra_table
    from nystrom.recipes import convert, fill_mask, finetune, lra, pretrain
    from nystrom.report import command as report

    @dataclass(frozen=True)
    class Bench:
        """Measure attention: time, memory, error. One JSON line per measurement, with machine, versions and commit."""

        measure: OmitSubcommandPrefixes[
            Annotated[speed.Speed, subcommand("speed")]
            | Annotated[memory.Memory, subcommand("memory")]
            | Annotated[error.Error, subcommand("error")]
            | Annotated[synthetic.Synthetic, subcommand("synthetic")]
            | Annotated[models.Models, subcommand("models")]
            | Annotated[steps.Lra, subcommand("lra")]
            | Annotated[scale.Scale, subcommand("scale")]
            | Annotated[ranks.Ranks, subcommand("ranks")]
            | Annotated[sentences.Sts, subcommand("sts")]
            | Annotated[sentences.Retrieval, subcommand("retrieval")]
            | Annotated[table.Table, subcommand("table")]
            | Annotated[plot.Plot, subcommand("plot")]
            | Annotated[front.Front, subcommand("front")]
            | Annotated[growth.Growth, subcommand("growth")]
        ]

    @dataclass(frozen=True)
    class Finetune:
        """Fine-tune a pretrained encoder on GLUE, IMDB or tables of your own, with any attention."""

        task: OmitSubcommandPrefixes[
            Annotated[finetune.Glue, subcommand("glue")]
            | Annotated[finetune.Imdb, subcommand("imdb")]
            | Annotated[finetune.Csv, subcommand("csv")]
        ]

    @dataclass(frozen=True)
    class Lra:
        """Long Range Arena: train on one of its tasks with one kind of attention; a table of such runs."""

        task: OmitSubcommandPrefixes[
            Annotated[lra.ListOps, subcommand("listops")]
            | Annotated[lra.Text, subcommand("text")]
            | Annotated[lra.Retrieval, subcommand("retrieval")]
            | Annotated[lra.Image, subcommand("image")]
            | Annotated[lra.Pathfinder, subcommand("pathfinder")]
            | Annotated[lra_table.Table, subcommand("table")]
        ]

    command = tyro.cli(
        Annotated[demo.Demo, subcommand("demo")]  # pyright: ignore[reportArgumentType]
        | Annotated[pretrain.Pretrain, subcommand("pretrain")]
        | Annotated[fill_mask.FillMask, subcommand("fill-mask")]
        | Annotated[Finetune, subcommand("finetune")]
        | Annotated[Lra, subcommand("lra")]
        | Annotated[report.Report, subcommand("report")]
        | Annotated[inspection.Inspect, subcommand("inspect")]
        | Annotated[convert.Convert, subcommand("convert")]
        | Annotated[plan.Plan, subcommand("plan")]
        | Annotated[Bench, subcommand("bench")],
        prog=PROGRAM,
        description=ABOUT,
        args=arguments,
    )
    match command:
        case demo.Demo():
            demo.run(command)
        case pretrain.Pretrain():
            pretrain.run(command)
        case fill_mask.FillMask():
            fill_mask.run(command)
        case Finetune(task):
            finetune.run(task)
        case Lra(lra_table.Table() as config):
            lra_table.run(config)
        case Lra(lra.Lra() as task):
            lra.run(task)
        case report.Report():
            report.run(command)
        case inspection.Inspect():
            inspection.run(command)
        case convert.Convert():
            convert.run(command)
        case plan.Plan():
            plan.run(command)
        case Bench(speed.Speed() as config):
            speed.run(config)
        case Bench(memory.Memory() as config):
            memory.run(config)
        case Bench(error.Error() as config):
            error.run(config)
        case Bench(synthetic.Synthetic() as config):
            synthetic.run(config)
        case Bench(models.Models() as config):
            models.run(config)
        case Bench(growth.Growth() as config):
            growth.run(config)
        case Bench(scale.Scale() as config):
            scale.run(config)
        case Bench(ranks.Ranks() as config):
            ranks.run(config)
        case Bench(steps.Lra() as config):
            steps.run(config)
        case Bench(sentences.Sts() as config):
            sentences.run_sts(config)
        case Bench(sentences.Retrieval() as config):
            sentences.run_retrieval(config)
        case Bench(table.Table() as config):
            table.run(config)
        case Bench(plot.Plot() as config):
            plot.run(config)
        case Bench(front.Front() as config):
            front.run(config)
