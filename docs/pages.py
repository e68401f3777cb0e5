"""Generates the pages of the documentation site that have another source. A hook of mkdocs; see mkdocs.yml.

| page                  | source                                       |
|-----------------------|----------------------------------------------|
| index.md              | README.md                                    |
| contributing.md       | CONTRIBUTING.md                              |
| changelog.md          | CHANGELOG.md                                 |
| security.md           | SECURITY.md                                  |
| recipe*.md            | the schemas of the recipes                   |
| commands/<command>.md | the parser of `karat`                        |
"""

import argparse
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from karat_scale.commands.cli import build_parser
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.base import Effect
from karat_scale.recipe.keys import Key, KeySection, sections_of, type_in_words
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

ROOT = Path(__file__).resolve().parent.parent
_PAGES_OF_ROOT = {
    "README.md": "index.md",
    **{f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")},
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the commands into the navigation."""
    for entry in config.nav or []:
        if "Commands" in entry:
            entry["Commands"] = [{f"karat {name}": f"commands/{name}.md"} for name in _commands()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replace a link to a file outside docs/ by the file's path, unless the site has a page made from that file."""
    here = posixpath.dirname(page.file.src_uri)

    def on_the_site(link: re.Match[str]) -> str:
        text, path, anchor = link.groups(default="")
        target = posixpath.normpath(posixpath.join("docs", here, path))
        if target in _PAGES_OF_ROOT:
            return f"[{text}]({posixpath.relpath(_PAGES_OF_ROOT[target], here or '.')}{anchor})"
        if target.startswith("docs/"):
            return link[0]
        return f"`{target}`" if text == target else f"{text} (`{target}`)"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)", on_the_site, markdown)


def generated_pages() -> dict[str, str]:
    """Return the Markdown of each generated page by its path."""
    texts = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in _PAGES_OF_ROOT.items()}
    pages = {
        **{page: page_of_root(text) for page, text in texts.items()},
        "recipe.md": recipe_page(Recipe, "Recipe keys", "karat train"),
        "recipe_detection.md": recipe_page(DetectionRecipe, "Detection recipe keys", "karat detect"),
    }
    return pages | {f"commands/{name}.md": command_page(parser, text) for name, (parser, text) in _commands().items()}


def page_of_root(text: str) -> str:
    """Return a page of the clone's root with its links as they are relative to docs/, without the badges of its CI."""
    text = re.sub(r"^\[!\[.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\((?!https?:|#)(?:docs/)?", lambda link: "](" if link[0].endswith("docs/") else "](../", text)


def recipe_page(schema: type[RunRecipe], title: str, command: str) -> str:
    """Return a table for each section of a recipe: every key with its type, default, effect and meaning."""
    introduction = (
        f"---\nhide: [toc]\n---\n\n# {title}\n\n"
        f"These are all keys of a recipe of `{command}`. A key that is not required has a default. "
        "An unknown key, a value of another type and a value out of range are refused with one line.\n\n"
        "*Changes* says what another value of a key may change: "
        f"{'; '.join(f'`{effect.name.lower()}`, {effect.value}' for effect in Effect)}. A run that resumes accepts "
        "another value of a key that changes `nothing`, `speed` or `rounding`. For the others, see "
        "[Change a recipe on purpose](checkpoints.md#change-a-recipe-on-purpose).\n"
    )
    return "\n".join([introduction, *map(_section, sections_of(schema))])


def _section(section: KeySection) -> str:
    """Return the Markdown of a section: its docstring and the table of its keys."""
    head = f"## {section.name}\n\n{_prose(section.meaning)}\n\n" if section.name else ""
    if not section.keys:
        return head
    return (
        f"{head}| key | type | default | changes | meaning |\n|---|---|---|---|---|\n{''.join(map(_row, section.keys))}"
    )


def _row(key: Key) -> str:
    kind = type_in_words(key.schema, "`{}`".format)
    default = "required" if key.default is None else f"`{key.default}`"
    return (
        f"| `{key.name}`{{ #{key.name} }} | {kind} | {default} | {key.effect.name.lower()} | {_prose(key.meaning)} |\n"
    )


def _prose(text: str) -> str:
    """Return a docstring in which the pages of docs/ are links."""
    return re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)


def command_page(parser: argparse.ArgumentParser, text: str) -> str:
    """Return the usage and the options of a command, and of the commands below it."""
    page = f"# {parser.prog}\n\n{_sentence(text)}\n\n{_arguments(parser)}"
    for below, about in _subcommands(parser).values():
        page += f"\n## {below.prog}\n\n{_sentence(about)}\n\n{_arguments(below)}"
    return page


def _arguments(parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    named = [action for action in actions if action.option_strings]
    usage = " ".join([parser.prog, *(["[options]"] if named else []), *(_place(a) for a in actions if a not in named)])
    rows = "".join(f"| {_name(action)} | {_meaning(parser, action)} |\n" for action in actions if action.help or named)
    table = f"\n| argument | meaning |\n|---|---|\n{rows}" if rows else ""
    return f"```\n{usage}\n```\n{table}"


def _place(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return {"*": f"[{name} ...]", "+": f"{name} [{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    takes_value = action.nargs != 0
    value = action.metavar or ("" if action.choices else action.dest.upper())
    return f"`{', '.join(action.option_strings)}{f' {value}' if takes_value and value else ''}`"


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    if action.choices and not isinstance(action, argparse._SubParsersAction):
        text = f"{text}{'; ' if text else ''}one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    if action.default not in (None, [], False, argparse.SUPPRESS) and "default:" not in text:
        default = " ".join(action.default) if isinstance(action.default, tuple) else action.default
        text = f"{text} (default: {default})"
    return text.strip().replace("|", r"\|")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _commands() -> dict[str, tuple[argparse.ArgumentParser, str]]:
    return _subcommands(build_parser())


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Return the parser and the help of each command below a parser. argparse has no public way to list them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {about.dest: (action.choices[about.dest], about.help or "") for about in action._choices_actions}
    return {}
