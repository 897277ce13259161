// Markdown inside a line: text into a list of nodes, without touching the document.
//
// A node is {type: "text", text} | {type: "code", text} | {type: "break"} | {type: "emphasis" | "strong" | "strike",
// children} | {type: "link", href, children} | {type: "image", href, children}. A link's href passed `safeHref`.
// Work is linear in the length of the text, up to a constant depth; nothing here is ever taken for HTML.

const MAX_DEPTH = 12; // brackets within brackets, emphasis within emphasis
const MAX_BRACKETS = 64; // that wait for their end
const MAX_ADDRESS = 2048;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE = /^(?:https?:\/\/|www\.)[^\s<>"'`|\\^{}]+/i;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: " ", hellip: "…", ndash: "–", mdash: "—" };

/** The address if a link may lead there (http, https, mailto), else null. Relative addresses lead nowhere. */
export function safeHref(address) {
  // Browsers drop tabs and line breaks inside addresses; those with any control character are refused whole.
  if (/[\u0000-\u0020\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/.test(address)) return null;
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol === "mailto:") return url.href;
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  return url.username || url.password ? null : url.href; // https://bank.example@evil.example/ deceives
}

/** The nodes of one paragraph's or cell's text. */
export function parseInline(text) {
  const nodes = [];
  const marks = []; // runs of * _ ~ that may open or close
  const brackets = []; // [ and ![ that may begin a link
  let plain = "";
  let i = 0;

  const flush = () => {
    if (plain) nodes.push({ type: "text", text: plain });
    plain = "";
  };
  const codeEnds = backtickRuns(text);

  while (i < text.length) {
    const c = text[i];
    if (c === "\\") {
      const next = text[i + 1];
      if (next === "\n") {
        flush();
        nodes.push({ type: "break" });
        i += 2;
      } else if (next && ESCAPABLE.test(next)) {
        plain += next;
        i += 2;
      } else {
        plain += c;
        i += 1;
      }
    } else if (c === "`") {
      const length = runLength(text, i, "`");
      const end = codeEnds(i + length, length);
      if (end < 0) {
        plain += text.slice(i, i + length);
        i += length;
      } else {
        flush();
        nodes.push({ type: "code", text: codeText(text.slice(i + length, end)) });
        i = end + length;
      }
    } else if (c === "*" || c === "_" || c === "~") {
      const length = runLength(text, i, c);
      const mark = flanking(text, i, length, c);
      if (c === "~" && length !== 2) {
        plain += text.slice(i, i + length);
      } else {
        flush();
        mark.node = nodes.length;
        nodes.push({ type: "text", text: text.slice(i, i + length) });
        marks.push(mark);
      }
      i += length;
    } else if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      flush();
      const image = c === "!";
      brackets.push({ image, node: nodes.length, mark: marks.length });
      if (brackets.length > MAX_BRACKETS) brackets.shift();
      nodes.push({ type: "text", text: image ? "![" : "[" });
      i += image ? 2 : 1;
    } else if (c === "]") {
      i = closeBracket(i);
    } else if (c === "<") {
      const found = /^<([a-z][a-z0-9+.-]{1,31}:[^\s<>]*)>/i.exec(text.slice(i, i + MAX_ADDRESS));
      const href = found && safeHref(found[1]);
      if (href) {
        flush();
        nodes.push({ type: "link", href, children: [{ type: "text", text: found[1] }] });
        i += found[0].length;
      } else {
        plain += c;
        i += 1;
      }
    } else if (c === "&") {
      const found = /^&(?:([a-z]{2,8})|#(\d{1,7})|#x([0-9a-f]{1,6}));/i.exec(text.slice(i, i + 12));
      const character = found && entity(found);
      plain += character || c;
      i += character ? found[0].length : 1;
    } else if (c === "\n") {
      const hard = / {2,}$/.test(plain.slice(-2));
      plain = plain.replace(/ +$/, "");
      if (hard) {
        flush();
        nodes.push({ type: "break" });
      } else {
        plain += "\n";
      }
      i += 1;
    } else if ((c === "h" || c === "H" || c === "w" || c === "W") && !/[\w@/]/.test(text[i - 1] || " ")) {
      const length = bareLink(i);
      if (length === 0) plain += text[i++];
      else i += length;
    } else {
      plain += c;
      i += 1;
    }
  }
  flush();
  pairMarks(nodes, marks, 0);
  return tidy(nodes);

  function bareLink(at) {
    const found = BARE.exec(text.slice(at, at + MAX_ADDRESS));
    if (!found || found[0].length === MAX_ADDRESS) return 0;
    const address = trimAddress(found[0]);
    const href = safeHref(/^www\./i.test(address) ? `https://${address}` : address);
    if (!href) return 0;
    flush();
    nodes.push({ type: "link", href, children: [{ type: "text", text: address }] });
    return address.length;
  }

  function closeBracket(at) {
    const bracket = brackets.pop();
    const target = bracket && linkTarget(text, at + 1);
    if (!target) {
      plain += "]";
      return at + 1;
    }
    flush();
    pairMarks(nodes, marks, bracket.mark);
    marks.length = bracket.mark;
    const children = dropOpening(tidy(nodes.splice(bracket.node)), bracket.image ? 2 : 1);
    const href = safeHref(target.address);
    if (!href) {
      // The label is shown, and the address as text: a reader sees what was meant, and nothing can be followed.
      for (const child of children) nodes.push(child);
      nodes.push({ type: "text", text: ` (${target.address})` });
    } else if (bracket.image) {
      nodes.push({ type: "image", href, children: withoutLinks(children) });
    } else {
      nodes.push({ type: "link", href, children: withoutLinks(children) });
      for (const open of brackets) if (!open.image) open.dead = true;
    }
    while (brackets.length && brackets[brackets.length - 1].dead) brackets.pop();
    return target.end;
  }
}

/** The text that nodes show. */
export function plainText(nodes) {
  return nodes.map((n) => (n.type === "break" ? "\n" : n.children ? plainText(n.children) : n.text)).join("");
}

function runLength(text, start, character) {
  let end = start;
  while (text[end] === character) end += 1;
  return end - start;
}

/** A function (from, length) that gives where the next run of exactly `length` backticks begins, or -1. */
function backtickRuns(text) {
  const starts = new Map();
  for (const run of text.matchAll(/`+/g)) {
    if (!starts.has(run[0].length)) starts.set(run[0].length, { places: [], next: 0 });
    starts.get(run[0].length).places.push(run.index);
  }
  return (from, length) => {
    const runs = starts.get(length);
    if (!runs) return -1;
    while (runs.next < runs.places.length && runs.places[runs.next] < from) runs.next += 1;
    return runs.next < runs.places.length ? runs.places[runs.next] : -1;
  };
}

function codeText(raw) {
  const text = raw.replaceAll("\n", " ");
  return text.startsWith(" ") && text.endsWith(" ") && text.trim() ? text.slice(1, -1) : text;
}

/** Whether a run of marks may open or close, as CommonMark defines it. */
function flanking(text, start, length, character) {
  const before = text[start - 1] || " ";
  const after = text[start + length] || " ";
  const spaceBefore = /\s/.test(before);
  const spaceAfter = /\s/.test(after);
  const left = !spaceAfter && (!PUNCTUATION.test(after) || spaceBefore || PUNCTUATION.test(before));
  const right = !spaceBefore && (!PUNCTUATION.test(before) || spaceAfter || PUNCTUATION.test(after));
  const within = character === "_"; // snake_case is no emphasis
  return {
    character,
    length,
    whole: length,
    opens: left && (!within || !right || PUNCTUATION.test(before)),
    closes: right && (!within || !left || PUNCTUATION.test(after)),
  };
}

/** Turn pairs of marks from `bottom` on into emphasis; what is left of them stays text. */
function pairMarks(nodes, marks, bottom) {
  const floor = {}; // below this place no mark opens for such a closer: what keeps the search linear
  const open = [];
  for (let place = bottom; place < marks.length; place += 1) {
    const closer = marks[place];
    while (closer.closes && closer.length > 0) {
      const key = `${closer.character}${closer.opens}${closer.whole % 3}`;
      let at = open.length - 1;
      while (at >= (floor[key] || 0) && !pairs(open[at], closer)) at -= 1;
      if (at < (floor[key] || 0)) {
        floor[key] = open.length;
        break;
      }
      const opener = open[at];
      open.length = at + 1;
      for (const name of Object.keys(floor)) floor[name] = Math.min(floor[name], open.length);
      const used = opener.length >= 2 && closer.length >= 2 ? 2 : 1;
      opener.length -= used;
      closer.length -= used;
      const type = closer.character === "~" ? "strike" : used === 2 ? "strong" : "emphasis";
      (nodes[opener.node].after ||= []).unshift(type);
      (nodes[closer.node].before ||= []).push(type);
      if (opener.length === 0) open.pop();
    }
    if (closer.opens && closer.length > 0) open.push(closer);
  }
  for (let place = bottom; place < marks.length; place += 1) {
    nodes[marks[place].node].text = marks[place].character.repeat(marks[place].length);
  }
  nest(nodes, bottom < marks.length ? marks[bottom].node : nodes.length);
}

function pairs(opener, closer) {
  if (opener.character !== closer.character) return false;
  if (closer.character === "~") return opener.length === 2 && closer.length === 2;
  const odd = (opener.closes || closer.opens) && (opener.whole + closer.whole) % 3 === 0;
  return !odd || (opener.whole % 3 === 0 && closer.whole % 3 === 0);
}

/** Build the tree that `before` and `after` of flat nodes describe, in place from index `from` on. */
function nest(nodes, from) {
  const root = [];
  const stack = [{ children: root }];
  for (const node of nodes.splice(from)) {
    const { before = [], after = [], ...rest } = node;
    for (let n = 0; n < before.length; n += 1) {
      const done = stack.pop();
      const parent = stack[stack.length - 1].children;
      if (stack.length <= MAX_DEPTH) parent.push({ type: done.type, children: done.children });
      else for (const child of done.children) parent.push(child);
    }
    if (rest.type !== "text" || rest.text) stack[stack.length - 1].children.push(rest);
    for (const type of after) stack.push({ type, children: [] });
  }
  for (const node of root) nodes.push(node); // not push(...root): an argument list has its limits
}

/** The target after a link's label: `(address "title")`. Null where there is none. */
function linkTarget(text, at) {
  if (text[at] !== "(") return null;
  const part = text.slice(at, at + 4096);
  const found = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))?\s*\)/.exec(part);
  if (!found) return null;
  const address = (found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  return { address: address.replaceAll("&amp;", "&"), end: at + found[0].length };
}

/** A bare address without the punctuation of its sentence. */
function trimAddress(address) {
  let end = address.length;
  for (;;) {
    const last = address[end - 1];
    if (/[.,:;!?*_~\]]/.test(last)) end -= 1;
    else if (last === ")" && count(address, "(", end) < count(address, ")", end)) end -= 1;
    else return address.slice(0, end);
  }
}

function count(text, character, end) {
  let found = 0;
  for (let i = 0; i < end; i += 1) if (text[i] === character) found += 1;
  return found;
}

function entity(found) {
  const [, name, decimal, hexadecimal] = found;
  if (name) return ENTITIES[name] || "";
  const code = decimal ? parseInt(decimal, 10) : parseInt(hexadecimal, 16);
  if (code === 0 || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return "\ufffd";
  return String.fromCodePoint(code);
}

function dropOpening(children, length) {
  const [first, ...rest] = children;
  const text = first.text.slice(length);
  return text ? [{ ...first, text }, ...rest] : rest;
}

function withoutLinks(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link" || node.type === "image") return withoutLinks(node.children);
    return node.children ? [{ ...node, children: withoutLinks(node.children) }] : [node];
  });
}

/** Neighbouring texts as one. */
function tidy(nodes) {
  const merged = [];
  for (const node of nodes) {
    const last = merged[merged.length - 1];
    if (node.type === "text" && last && last.type === "text") {
      merged[merged.length - 1] = { type: "text", text: last.text + node.text };
    } else {
      merged.push(node);
    }
  }
  return merged;
}
