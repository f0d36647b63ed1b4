"""`python -m tests.torture`: the promises, the catalogue of bad input and the table of formats, tried and printed."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from torture import round_trips
from torture.cases import cases
from torture.catalogue import try_case
from torture.promises import ALIASES, PROMISES, keep
from torture.table import Counts

COLUMNS = 80


def main(argv=None):
    """Run what is asked for; return 1 if anything is not as promised."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        epilog="promises: " + "; ".join(f"{name} {what}" for name, (what, _) in PROMISES.items()),
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="P1, P2, ... (default: all), or 'catalogue' (bad input, exit codes, messages), or 'formats' (round trips)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of tables")
    parser.add_argument("--only", metavar="TEXT", help="catalogue: groups or names with this text only")
    for field in dataclasses.fields(Counts):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default: {field.default}")
    options = parser.parse_args(argv)
    if "catalogue" in options.what:
        return _catalogue(options)
    if "formats" in options.what:
        return _formats(options)
    names = [ALIASES.get(name.upper(), name.upper()) for name in options.what] or list(PROMISES)
    if unknown := set(names) - set(PROMISES):
        parser.error(
            f"WHAT must be of {', '.join((*PROMISES, *ALIASES))}, catalogue, formats; got {', '.join(unknown)}"
        )
    return _promises(options, list(dict.fromkeys(names)))


def _promises(options, names):
    """Try promises one after the other; a line is printed as soon as it is known."""
    counts = Counts(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Counts)})
    failed = owed = count = 0
    if not options.json:
        print("promise  what was done -> figure  [verdict, seconds, load of the machine]")
    for name in names:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for line in keep(name, counts, Path(folder) / "trial"):
                seconds, begin = time.monotonic() - begin, time.monotonic()
                count, failed, owed = count + 1, failed + (line.passed is False), owed + (line.passed is None)
                if options.json:
                    record = dataclasses.asdict(line) | {"seconds": seconds, "load": os.getloadavg()[0]}
                    print(json.dumps(record), flush=True)
                    continue
                word = {True: "pass", False: "FAIL", None: "owed"}[line.passed]
                text = f"{line.promise:<4} {line.done} -> {line.figure}"
                text += f"  [{word}, {seconds:.0f} s, {os.getloadavg()[0]:.1f}]"
                print(textwrap.fill(text, 120, subsequent_indent=" " * 5), flush=True)
                for detail in line.details[:5]:
                    print(textwrap.indent(detail[-2000:], "       "), flush=True)
    _sum(options, f"{count} lines: {count - failed - owed} as promised, {failed} not, {owed} owed")
    return int(failed > 0)


def _catalogue(options):
    """Print every case with its exit code and what it says, as on a terminal of 80 columns."""
    failed = count = 0
    group, begin = "", time.monotonic()
    for case in cases():
        if options.only and options.only not in f"{case.group}: {case.name}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            verdict = try_case(case, Path(folder))
        count += 1
        failed += bool(verdict.faults)
        if options.json:
            record = {"group": case.group, "case": case.name, "promised": case.code, "exit_code": verdict.code}
            print(json.dumps(record | {"says": verdict.lines, "faults": verdict.faults, "skipped": verdict.skipped}))
            continue
        if case.group != group:
            group = case.group
            print(f"\n{group.upper()}")
        told = f"skipped: {verdict.skipped}" if verdict.skipped else f"exit {verdict.code}"
        print(f"\n{case.name}  [{told}]")
        for line in verdict.lines:
            print(textwrap.fill(line, COLUMNS, break_on_hyphens=False))
        for fault in verdict.faults:
            print(textwrap.fill(f"NOT AS PROMISED: {fault}", COLUMNS))
    seconds = time.monotonic() - begin
    _sum(options, f"{count} cases, {count - failed} as promised, {failed} not; {seconds:.0f} s")
    return int(failed > 0)


def _formats(options):
    """Print the largest error of a round trip for each format, type and unit, in steps of the stored type."""
    failed = 0
    if not options.json:
        print(f"{'':<14}" + "".join(f"{unit:>10}" for unit in round_trips.ALL_UNITS))
    with tempfile.TemporaryDirectory() as name:
        for row, dtype in round_trips.TABLE:
            cells = {}
            for unit in round_trips.units_of(dtype):
                errors = round_trips.measure(row, dtype, unit, options.values, Path(name), seed=options.seed)
                failed += not errors.fine
                cells[unit.name] = f"{errors.stored:.3f}" + ("" if errors.fine else " BAD")
                if options.json:
                    record = {"format": row, "dtype": str(dtype), "unit": unit.name, **dataclasses.asdict(errors)}
                    print(json.dumps(record | {"as_promised": errors.fine}))
            if not options.json:
                texts = (cells.get(round_trips.io.parse_unit(unit).name, "-") for unit in round_trips.ALL_UNITS)
                print(f"{row:<5}{dtype!s:<9}" + "".join(f"{text:>10}" for text in texts))
    _sum(options, "largest error of what is stored, in steps of the type (a half is rounding); - = not for that type")
    return int(failed > 0)


def _sum(options, text):
    print(f"\n{text}" if not options.json else text, file=sys.stderr if options.json else sys.stdout)
