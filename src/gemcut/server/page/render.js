// Markdown into elements, while it is still being written.
//
// A model's text is hostile until shown as text: elements come from a fixed list, their attributes from `safeHref` and
// from constants, everything else is a text node. Images are never fetched; a link stands in their place.

import { parseBlocks, toLines } from "./blocks.js";
import { button, copyText, h } from "./dom.js";
import { highlight, languageName } from "./highlight.js";
import { parseInline } from "./inline.js";

/** An element that shows a growing text. `update(text, done)` may be called for every piece. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.reset();
  }

  reset() {
    this.element.replaceChildren();
    this.text = "";
    this.settled = 0; // so many characters are shown by elements that will not change
    this.open = []; // the elements of the rest
    this.heading = 2; // level of the last heading among the settled: a message's own is 2
    this.done = false;
  }

  /** Show `text`. Where it continues what is shown, only its end is read again. */
  update(text, done = false) {
    if (text === this.text && done === this.done) return;
    if (!text.startsWith(this.text) || this.done) this.reset();
    this.text = text;
    this.done = done;
    const rest = text.slice(this.settled);
    const lines = toLines(rest);
    const blocks = parseBlocks(lines);
    // A block is settled when the next one begins in a whole line; the last line may still become anything.
    let settled = 0;
    if (done) settled = blocks.length;
    else while (settled + 1 < blocks.length && blocks[settled + 1].start < lines.length - 1) settled += 1;
    const levels = { last: this.heading };
    const made = [];
    blocks.forEach((block, i) => {
      made.push(renderBlock(block, levels, done || i < settled));
      if (i + 1 === settled) this.heading = levels.last;
    });
    this.show(made);
    this.open = made.slice(settled);
    if (!done && settled > 0) this.settled += lengthOfLines(rest, blocks[settled].start);
  }

  /** Replace what is open by `made`; code that only grew keeps its element, and with it a reader's selection. */
  show(made) {
    made.forEach((element, i) => {
      const old = this.open[i];
      if (!old) this.element.append(element);
      else if (grown(old, element)) made[i] = old;
      else old.replaceWith(element);
    });
    for (const old of this.open.slice(made.length)) old.remove();
  }
}

/** The elements of a whole text. */
export function renderMarkdown(text) {
  const levels = { last: 2 };
  return parseBlocks(toLines(text)).map((block) => renderBlock(block, levels, true));
}

function lengthOfLines(text, count) {
  let at = 0;
  for (let line = 0; line < count; line += 1) {
    while (text[at] !== "\n" && text[at] !== "\r") at += 1;
    at += text[at] === "\r" && text[at + 1] === "\n" ? 2 : 1;
  }
  return at;
}

function grown(old, next) {
  if (!old.classList.contains("code") || !next.classList.contains("code")) return false;
  if (next.dataset.state !== "open" || old.dataset.language !== next.dataset.language) return false;
  const before = old.querySelector("code").firstChild;
  const after = next.querySelector("code").firstChild;
  if (!before || !after || !after.data.startsWith(before.data)) return false;
  before.appendData(after.data.slice(before.data.length));
  return true;
}

function renderBlock(block, levels, settled) {
  switch (block.type) {
    case "heading":
      return renderHeading(block, levels);
    case "rule":
      return h("hr");
    case "code":
      return renderCode(block, settled);
    case "quote":
      return h("blockquote", {}, ...block.children.map((child) => renderBlock(child, levels, settled)));
    case "list":
      return renderList(block, levels, settled);
    case "table":
      return renderTable(block);
    default:
      return h("p", {}, ...renderText(block.text));
  }
}

/** Levels as a screen reader needs them (none left out, below the message's own), sizes as they were written. */
function renderHeading({ level, text }, levels) {
  const real = Math.max(3, Math.min(level + 2, levels.last + 1, 6));
  levels.last = real;
  return h(`h${real}`, { class: `size-${level}` }, ...renderText(text));
}

function renderList({ ordered, first, loose, items }, levels, settled) {
  const list = h(ordered ? "ol" : "ul", ordered && first !== 1 ? { start: first } : {});
  for (const { task, children } of items) {
    const item = h("li", { class: task === null ? null : "task" });
    if (task !== null) item.append(h("span", { class: "box" }, task ? "☑ " : "☐ "));
    for (const child of children) {
      if (child.type === "paragraph" && !loose) item.append(...renderText(child.text));
      else item.append(renderBlock(child, levels, settled));
    }
    list.append(item);
  }
  return list;
}

function renderTable({ align, head, rows }) {
  const classes = (column) => ({ class: align[column] ? `align-${align[column]}` : null });
  const header = head.map((text, column) => h("th", { scope: "col", ...classes(column) }, ...renderText(text)));
  const body = rows.map((row) => h("tr", {}, ...row.map((text, c) => h("td", classes(c), ...renderText(text)))));
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...header)), h("tbody", {}, ...body));
  return h("div", { class: "table", tabindex: 0, role: "group", "aria-label": "Table" }, table);
}

function renderCode({ language, text, closed }, settled) {
  const ready = settled || closed;
  const code = h("code", {}, ...(ready ? highlight(text, language) : [text]));
  const copy = button("copy", "Copy code", async () => {
    const whole = code.textContent;
    const done = await copyText(whole);
    copy.querySelector("span").textContent = done ? "Copied" : "Not copied";
    setTimeout(() => {
      copy.querySelector("span").textContent = "Copy code";
    }, 1500);
  }, { text: true, class: "quiet" });
  const name = languageName(language);
  const bar = h("div", { class: "code-bar" }, h("span", { class: "language" }, name), copy);
  const pre = h("pre", { tabindex: 0, role: "group", "aria-label": name ? `Code, ${name}` : "Code" }, code);
  return h("div", { class: "code", "data-state": ready ? "whole" : "open", "data-language": language }, bar, pre);
}

function renderText(text) {
  return parseInline(text).map(renderInline);
}

function renderInline(node) {
  switch (node.type) {
    case "code":
      return h("code", {}, node.text);
    case "break":
      return h("br");
    case "emphasis":
      return h("em", {}, ...node.children.map(renderInline));
    case "strong":
      return h("strong", {}, ...node.children.map(renderInline));
    case "strike":
      return h("s", {}, ...node.children.map(renderInline));
    case "link":
    case "image":
      return renderLink(node);
    default:
      return document.createTextNode(node.text);
  }
}

function renderLink({ type, href, children }) {
  const options = { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href };
  if (type === "link") return h("a", options, ...children.map(renderInline));
  return h("a", { ...options, class: "image" }, "Image: ", ...(children.length ? children.map(renderInline) : [href]));
}
