// Colours for code: one scanner for all languages, driven by what each calls a comment, a string and a keyword.
//
// It colours and changes no character: the texts of all pieces together are the code. Larger code stays plain.

import { h } from "./dom.js";

const MAX_CHARACTERS = 50_000;

const words = (text) => new Set(text.split(" "));
const C_COMMENTS = ["//[^\\n]*", "/\\*[^]*?(?:\\*/|$)"];
const HASH = ["#[^\\n]*"];
const DOUBLE = '"(?:[^"\\\\\\n]|\\\\[^])*"?';
const SINGLE = "'(?:[^'\\\\\\n]|\\\\[^])*'?";
const TEMPLATE = "`(?:[^`\\\\]|\\\\[^])*`?";
const TRIPLE = ['"""[^]*?(?:"""|$)', "'''[^]*?(?:'''|$)"];

const C_WORDS =
  "auto bool break case catch char class const constexpr continue default delete do double else enum extern false " +
  "float for friend goto if inline int long namespace new noexcept nullptr operator private protected public return " +
  "short signed sizeof static struct switch template this throw true try typedef typename union unsigned using " +
  "virtual void volatile while include define ifdef ifndef endif pragma";

const LANGUAGES = {
  python: {
    name: "Python",
    comments: HASH,
    strings: [...TRIPLE, DOUBLE, SINGLE],
    words: words(
      "and as assert async await break case class continue def del elif else except False finally for from global if " +
        "import in is lambda match None nonlocal not or pass raise return self True try while with yield",
    ),
  },
  javascript: {
    name: "JavaScript",
    comments: C_COMMENTS,
    strings: [DOUBLE, SINGLE, TEMPLATE],
    words: words(
      "abstract any as async await boolean break case catch class const continue debugger default delete do else enum " +
        "export extends false finally for from function get if implements import in instanceof interface let new null " +
        "number of private public readonly return set static string super switch this throw true try type typeof " +
        "undefined var void while yield",
    ),
  },
  json: { name: "JSON", comments: [], strings: [DOUBLE], words: words("true false null") },
  bash: {
    name: "Shell",
    comments: ["(?<![^\\s;])#[^\\n]*"],
    strings: [DOUBLE, "'[^']*'?"],
    words: words(
      "alias break case cd continue do done echo elif else esac exit export fi for function if in local read return " +
        "select set shift source sudo then time trap unset until while",
    ),
  },
  c: { name: "C", comments: C_COMMENTS, strings: [DOUBLE, SINGLE], words: words(C_WORDS) },
  java: {
    name: "Java",
    comments: C_COMMENTS,
    strings: [DOUBLE, SINGLE],
    words: words(
      `${C_WORDS} abstract boolean byte extends final finally fun implements import instanceof interface internal null ` +
        "override package super synchronized throws val var when var string foreach readonly record sealed is in out",
    ),
  },
  go: {
    name: "Go",
    comments: C_COMMENTS,
    strings: [DOUBLE, SINGLE, TEMPLATE],
    words: words(
      "bool break byte case chan const continue default defer else error fallthrough false float64 for func go goto if " +
        "import int int64 interface map nil package range return rune select string struct switch true type uint var",
    ),
  },
  rust: {
    name: "Rust",
    comments: C_COMMENTS,
    strings: [DOUBLE, "'(?:[^'\\\\\\n]|\\\\[^'\\n]+|\\\\')'"],
    words: words(
      "as async await bool break const continue crate dyn else enum extern f32 f64 false fn for i32 i64 if impl in let " +
        "loop match mod move mut pub ref return self Self static str String struct super trait true type u32 u64 u8 " +
        "unsafe use usize Vec where while Some None Ok Err",
    ),
  },
  sql: {
    name: "SQL",
    comments: ["--[^\\n]*", "/\\*[^]*?(?:\\*/|$)"],
    strings: [SINGLE, DOUBLE],
    anyCase: true,
    words: words(
      "all alter and as asc between by case create default delete desc distinct drop else end exists foreign from full " +
        "group having in index inner insert into is join key left like limit not null offset on or order outer primary " +
        "references right select set table then union unique update values view when where with",
    ),
  },
  html: {
    name: "HTML",
    comments: ["<!--[^]*?(?:-->|$)"],
    strings: [DOUBLE, "'[^'\\n]*'"],
    words: new Set(),
    tags: true,
  },
  css: { name: "CSS", comments: ["/\\*[^]*?(?:\\*/|$)"], strings: [DOUBLE, SINGLE], words: words("important from to") },
  yaml: { name: "YAML", comments: HASH, strings: [DOUBLE, "'[^'\\n]*'"], words: words("true false null yes no") },
  toml: { name: "TOML", comments: HASH, strings: [...TRIPLE, DOUBLE, "'[^'\\n]*'"], words: words("true false") },
  diff: { name: "Diff", lines: true },
};

const ALIASES = {
  py: "python", python3: "python", js: "javascript", jsx: "javascript", ts: "javascript", tsx: "javascript",
  typescript: "javascript", mjs: "javascript", jsonc: "json", json5: "json", sh: "bash", shell: "bash", zsh: "bash",
  console: "bash", cpp: "c", "c++": "c", cc: "c", h: "c", hpp: "c", cuda: "c", cu: "c", csharp: "java", cs: "java",
  kotlin: "java", kt: "java", scala: "java", swift: "java", golang: "go", rs: "rust", xml: "html", svg: "html",
  vue: "html", scss: "css", less: "css", yml: "yaml", ini: "toml", patch: "diff", postgresql: "sql", mysql: "sql",
};
const NAMES = { typescript: "TypeScript", ts: "TypeScript", cpp: "C++", "c++": "C++", csharp: "C#", cs: "C#",
  kotlin: "Kotlin", swift: "Swift", scala: "Scala", xml: "XML", svg: "SVG", scss: "SCSS", ini: "INI", cuda: "CUDA" };

const scanners = new Map();

/** What a block of code is called: the language's own name where we know it, else what the model wrote. */
export function languageName(language) {
  const key = language.toLowerCase();
  const known = find(key);
  if (Object.hasOwn(NAMES, key)) return NAMES[key];
  return known ? known.name : language.slice(0, 30);
}

/** The pieces of `code` as texts and coloured elements. */
export function highlight(code, language) {
  const rules = find(language.toLowerCase());
  if (!rules || code.length > MAX_CHARACTERS) return [code];
  return rules.lines ? byLines(code) : byTokens(code, rules);
}

function find(key) {
  const name = Object.hasOwn(ALIASES, key) ? ALIASES[key] : key;
  return Object.hasOwn(LANGUAGES, name) ? LANGUAGES[name] : null;
}

function byTokens(code, rules) {
  const pieces = [];
  let plainFrom = 0;
  for (const found of code.matchAll(scanner(rules))) {
    const { comment, string, number, word, tag } = found.groups;
    const text = found[0];
    const end = found.index + text.length;
    let kind = "";
    if (comment !== undefined) kind = "comment";
    else if (string !== undefined) kind = rules === LANGUAGES.json && isKey(code, end) ? "name" : "string";
    else if (number !== undefined) kind = "number";
    else if (tag !== undefined) kind = "keyword";
    else if (word !== undefined) kind = wordKind(rules, word, code, found.index, end);
    if (!kind) continue;
    if (found.index > plainFrom) pieces.push(code.slice(plainFrom, found.index));
    pieces.push(h("span", { class: `t-${kind}` }, text));
    plainFrom = end;
  }
  if (plainFrom < code.length) pieces.push(code.slice(plainFrom));
  return pieces;
}

function wordKind(rules, word, code, start, end) {
  if (rules.words.has(rules.anyCase ? word.toLowerCase() : word)) return "keyword";
  if (rules === LANGUAGES.yaml || rules === LANGUAGES.toml || rules === LANGUAGES.css) {
    return isKey(code, end) || /^ *=/.test(code.slice(end, end + 8)) ? "name" : "";
  }
  if (code[end] === "(") return "call";
  return /^[A-Z][A-Za-z0-9]*[a-z]/.test(word) && code[start - 1] !== "." && !rules.tags ? "type" : "";
}

const isKey = (code, end) => /^\s{0,4}:/.test(code.slice(end, end + 5));

function scanner(rules) {
  if (!scanners.has(rules)) {
    const parts = [];
    if (rules.comments.length) parts.push(`(?<comment>${rules.comments.join("|")})`);
    else parts.push("(?<comment>(?!))");
    parts.push(`(?<string>${rules.strings.join("|")})`);
    parts.push(rules.tags ? "(?<tag></?[A-Za-z][\\w-]*|/?>)" : "(?<tag>(?!))");
    parts.push("(?<number>\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)");
    parts.push("(?<word>[A-Za-z_][\\w]*)");
    scanners.set(rules, new RegExp(parts.join("|"), "g"));
  }
  return scanners.get(rules);
}

function byLines(code) {
  return code.split(/(?<=\n)/).map((line) => {
    const kinds = { "+": "added", "-": "removed", "@": "keyword" };
    const kind = Object.hasOwn(kinds, line[0]) ? kinds[line[0]] : "";
    return kind ? h("span", { class: `t-${kind}` }, line) : line;
  });
}
