"""What `mkdocs build` does: links out of docs/, docstrings, and a check that a page loads nothing foreign.

A link in a page is relative to where its source lies in the repository, so that it works on every host that shows the
repository. On the site each linked page, picture or record has the same place below the site's root, and the pages of
docs/ are at that root.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?\[[^\]]*\]\(|src=\"|href=\")([^)\s#\":]+)")
# An argument's type as docstrings have it, `int`, *optional*; and another object they name, [`~Class.method`].
TYPE = re.compile(r"<code>[^<]*`[^<]*</code>")
REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")
# What makes a browser ask another host without a click.
FOREIGN = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def source(src_uri: str) -> str:
    """Where a page's source lies in the repository."""
    return src_uri if not (ROOT / "docs" / src_uri).exists() else posixpath.join("docs", src_uri)


def target(link: str, page: str) -> str | None:
    """The file in the repository that a link of a page leads to, by its path; a folder's is a README, there or not."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / path).is_dir():
        return posixpath.join(path, "README.md")
    return path if (ROOT / path).is_file() else None


def content(page: str) -> str:
    """A page's text; of a folder without a README, a list of its files."""
    if (ROOT / page).is_file():
        return (ROOT / page).read_text(encoding="utf-8")
    names = sorted(path.name for path in (ROOT / page).parent.iterdir() if path.is_file())
    return f"# {posixpath.dirname(page)}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)


def on_files(files, config):
    """Adds to the site what its pages link to outside of docs/, and what those pages link to."""
    waiting = [source(file.src_uri) for file in files.documentation_pages()]
    waiting += ["results/README.md", "training/README.md", "training/recipes/README.md"]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if not (ROOT / page).is_file():
            files.append(File.generated(config, page, content=content(page)))
        elif not page.startswith("docs/"):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
        if page.endswith(".md"):
            links = {target(link, page) for _, link in LINK.findall(content(page))}
            found = {path for path in links - seen if path and not path.startswith("docs/")}
            waiting += sorted(found)
            seen |= found
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page from the places in the repository to those on the site."""
    where = source(page.file.src_uri)

    def rewrite(match):
        found = target(match[2], where)
        if found is None:
            return match[0]  # mkdocs says that it leads nowhere
        link = posixpath.relpath(found.removeprefix("docs/"), posixpath.dirname(page.file.src_uri) or ".")
        return match[1] + link

    return LINK.sub(rewrite, markdown)


def on_page_content(html, page, config, files):
    """Shows what docstrings in the Hugging Face format say of types and other objects as their own tools do."""
    if page.file.src_uri != "api.md":
        return html
    html = TYPE.sub(lambda match: match[0].replace("`", "").replace("*", ""), html)
    known = {name.rpartition(".")[2]: name for name in re.findall(r'id="(llm2slm[\w.]*)"', html)}

    def link(match):
        name = match[1].rpartition(".")[2]
        return f'<a href="#{known[name]}"><code>{name}</code></a>' if name in known else f"<code>{name}</code>"

    return REFERENCE.sub(link, html)


def on_post_page(output, page, config):
    """Raises an error for a page that would load something from another host."""
    if found := FOREIGN.search(output):
        if 'rel="canonical"' not in found[0]:
            raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output
