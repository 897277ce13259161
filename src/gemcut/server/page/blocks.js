// Markdown's blocks: lines into a list of nodes, without touching the document.
//
// A node is {type, start} with `start`, the index of its first line, and
//   heading {level, text} · paragraph {text} · rule · code {language, text, closed} · quote {children}
//   list {ordered, first, loose, items: [{task, children}]} · table {align, head: [text], rows: [[text]]}
// Texts still hold inline marks (inline.js). What follows a block never changes it once a whole line of the next one
// is there: a text that grows needs only its end read again (render.js).

const MAX_DEPTH = 12; // of quotes and lists within each other; deeper ones are paragraphs
const MAX_COLUMNS = 64;

// Each of these takes time linear in the line, whatever the line: a model's output must not be able to stop the page.
const FENCE = /^( {0,3})(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])(?:( +)(.*)|)$/;
const DELIMITER = /^[ \t|:-]*-[ \t|:-]*$/;

/** The lines of a text as `parseBlocks` takes them: tabs at their beginning are spaces, carriage returns gone. */
export function toLines(text) {
  return text.replace(/\r\n?/g, "\n").split("\n").map((line) => (line.includes("\t") ? withoutTabs(line) : line));
}

function withoutTabs(line) {
  return line.replace(/^[ \t]+/, widen).replace(/^( *(?:[-*+>]|\d{1,9}[.)]))\t+/, "$1 ");
}

function widen(space) {
  let width = 0;
  for (const c of space) width += c === "\t" ? 4 - (width % 4) : 1;
  return " ".repeat(Math.min(width, 400));
}

/** The blocks of some lines. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    blocks.push({ ...block, start: at });
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: headingText(line) }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && startsItem(line)) return readList(lines, at, depth);
  if (indent(line) >= 4) return readIndented(lines, at);
  if (startsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function headingText(line) {
  const text = line.trim().replace(/^#+/, "").trim();
  const bare = text.replace(/#+$/, "");
  return bare === "" || /[ \t]$/.test(bare) ? bare.trim() : text;
}

function readFence(lines, at, [, space, ticks, tickInfo, tildes, tildeInfo]) {
  const marks = ticks || tildes;
  const language = (tickInfo ?? tildeInfo).trim().split(/\s/, 1)[0];
  const end = new RegExp(`^ {0,3}[${marks[0]}]{${marks.length},}[ \\t]*$`);
  const content = [];
  for (let i = at + 1; i < lines.length; i += 1) {
    if (end.test(lines[i])) return [{ type: "code", language, text: content.join("\n"), closed: true }, i + 1];
    content.push(dedent(lines[i], space.length));
  }
  return [{ type: "code", language, text: content.join("\n"), closed: false }, lines.length];
}

function readIndented(lines, at) {
  let end = at;
  for (let i = at; i < lines.length && (blank(lines[i]) || indent(lines[i]) >= 4); i += 1) {
    if (!blank(lines[i])) end = i + 1;
  }
  const text = lines.slice(at, end).map((line) => dedent(line, 4)).join("\n");
  return [{ type: "code", language: "", text, closed: true }, end];
}

function readQuote(lines, at, depth) {
  const inner = [];
  let i = at;
  for (; i < lines.length && !blank(lines[i]); i += 1) {
    const quoted = QUOTE.test(lines[i]);
    if (!quoted && (interrupts(lines[i]) || startsItem(lines[i]))) break;
    inner.push(quoted ? lines[i].replace(QUOTE, "") : lines[i]);
  }
  return [{ type: "quote", children: parseBlocks(inner, depth + 1) }, i];
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = first[3] !== undefined;
  const kind = ordered ? first[2].slice(-1) : first[2];
  const outer = first[1].length;
  const items = [];
  let loose = false;
  let i = at;
  while (i < lines.length) {
    const found = ITEM.exec(lines[i]);
    if (!found || !continues(found, kind, outer) || RULE.test(lines[i])) break;
    const width = contentIndent(found);
    const nested = Math.min(width, found[1].length + 2); // models indent by two below "1. " as well
    const content = [found[5] || ""];
    let gap = false;
    i += 1;
    for (; i < lines.length; i += 1) {
      const line = lines[i];
      if (blank(line)) {
        gap = true;
        content.push("");
        continue;
      }
      const inside = indent(line) >= width || (indent(line) >= nested && startsItem(line));
      const lazy = !gap && !interrupts(line) && !startsItem(line) && indent(line) < width;
      if (!inside && !lazy) break;
      content.push(dedent(line, width));
      gap = false;
    }
    while (content.length && blank(content[content.length - 1])) content.pop();
    if (gap && i < lines.length && sameList(lines[i], kind, outer)) loose = true;
    const task = /^\[([ xX])\] +(?=\S)/.exec(content[0] || "");
    if (task) content[0] = content[0].slice(task[0].length);
    const children = parseBlocks(content, depth + 1);
    if (children.some(({ start }, n) => n > 0 && blank(content[start - 1]))) loose = true;
    items.push({ task: task ? task[1] !== " " : null, children });
  }
  return [{ type: "list", ordered, first: ordered ? Number(first[3]) : 1, loose, items }, i];
}

function continues(found, kind, outer) {
  const same = found[3] !== undefined ? found[2].slice(-1) === kind : found[2] === kind;
  return same && Math.abs(found[1].length - outer) < 4;
}

function sameList(line, kind, outer) {
  const found = ITEM.exec(line);
  return found !== null && !RULE.test(line) && continues(found, kind, outer);
}

function contentIndent([, space, marker, , gap = " ", rest]) {
  const inner = rest === undefined || rest === "" || gap.length > 4 ? 1 : gap.length;
  return space.length + marker.length + inner;
}

function startsTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !DELIMITER.test(lines[at + 1])) return false;
  if (!lines[at + 1].includes("|")) return false;
  const delimiters = cells(lines[at + 1]);
  if (delimiters.length > MAX_COLUMNS || !delimiters.every((cell) => /^:?-+:?$/.test(cell))) return false;
  return cells(lines[at]).length === delimiters.length;
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    if (cell.startsWith(":")) return cell.endsWith(":") ? "center" : "left";
    return cell.endsWith(":") ? "right" : "";
  });
  const rows = [];
  let i = at + 2;
  for (; i < lines.length && !blank(lines[i]) && !interrupts(lines[i]); i += 1) {
    const row = cells(lines[i]).slice(0, head.length);
    while (row.length < head.length) row.push("");
    rows.push(row);
  }
  return [{ type: "table", align, head, rows }, i];
}

/** The cells of a table's line; a | after a backslash or within backticks parts nothing. */
function cells(line) {
  const found = [];
  let cell = "";
  let code = false;
  const text = line.trim().replace(/^\|/, "");
  const lastTick = text.lastIndexOf("`");
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (text[i] === "|" && !(code && lastTick > i)) {
      found.push(cell.trim());
      cell = "";
      code = false;
    } else {
      if (text[i] === "`") code = !code;
      cell += text[i];
    }
  }
  if (cell.trim() || found.length === 0) found.push(cell.trim());
  return found;
}

function readParagraph(lines, at, depth) {
  const content = [lines[at].trimStart()];
  let i = at + 1;
  for (; i < lines.length && !blank(lines[i]); i += 1) {
    const under = /^ {0,3}(=+|-{2,})[ \t]*$/.exec(lines[i]);
    if (under) {
      const level = under[1][0] === "=" ? 1 : 2;
      return [{ type: "heading", level, text: content.join("\n").trim() }, i + 1];
    }
    const item = depth < MAX_DEPTH && ITEM.exec(lines[i]);
    // A year at the beginning of a line, "1984. ", begins no list within a paragraph.
    const list = item && item[5] && item[1].length < 4 && (item[3] === undefined || Number(item[3]) === 1);
    if (list || interrupts(lines[i]) || startsTable(lines, i)) break;
    content.push(lines[i].trimStart());
  }
  return [{ type: "paragraph", text: content.join("\n").trimEnd() }, i];
}

/** Whether a line begins a block even right after a paragraph's line. */
function interrupts(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function startsItem(line) {
  const found = ITEM.exec(line);
  return found !== null && !RULE.test(line);
}

function blank(line) {
  return !/\S/.test(line);
}

function indent(line) {
  return /^ */.exec(line)[0].length;
}

function dedent(line, width) {
  return line.slice(Math.min(width, indent(line)));
}
