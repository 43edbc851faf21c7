"""Writes docs/support.md from the program's own table: `python docs/support_page.py`."""

from __future__ import annotations

from pathlib import Path

from tiue_export.registry.support import FEATURES, OPTION_REFUSALS, REFUSALS, VERBS

PAGE = Path(__file__).with_name("support.md")


def support_page() -> str:
    """What a bundle can be given to, by what it has, and the reasons below the table."""
    notes: list[str] = []
    lines = [
        "# What works with what",
        "",
        "Generated from `tiue_export/registry/support.py`, which is asked before any work "
        "starts. A number is a reason below the table; what two features together rule "
        "out stands there too.",
        "",
        "| a bundle that has | " + " | ".join(f"`{verb}`" for verb in VERBS) + " |",
        "| --- |" + " :-: |" * len(VERBS),
    ]
    for name, feature in FEATURES.items():
        cells = [_cell(verb, name, notes) for verb in VERBS]
        lines.append(f"| {feature.title} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    together = [refusal for refusal in REFUSALS if len(refusal.features) > 1]
    lines += ["", "Not together:", ""]
    lines += [
        f"- {' with '.join(FEATURES[name].title for name in refusal.features)} "
        f"({', '.join(f'`{verb}`' for verb in refusal.verbs)}): {refusal.reason}. "
        f"{refusal.next_step}"
        for refusal in together
    ]
    lines += ["", "Options that mean nothing to a form are refused by name:", ""]
    lines += [
        f"- `{refusal.option}` ({', '.join(f'`{verb}`' for verb in refusal.verbs)}"
        f"{''.join(f', {FEATURES[name].title}' for name in refusal.features)}): {refusal.reason}."
        for refusal in OPTION_REFUSALS
    ]
    return "\n".join(lines) + "\n"


def _cell(verb: str, feature: str, notes: list[str]) -> str:
    for refusal in REFUSALS:
        if verb in refusal.verbs and refusal.features == (feature,):
            note = f"{refusal.reason[0].upper()}{refusal.reason[1:]}. {refusal.next_step}"
            if note not in notes:
                notes.append(note)
            return f"no [{notes.index(note) + 1}]"
    return "yes"


if __name__ == "__main__":
    PAGE.write_text(support_page(), "utf-8")
    print(PAGE)
