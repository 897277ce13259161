// Conversations as files: export, and import, which trusts nothing in a file.
//
// Two formats are read: the page's own (every conversation with its branches), and what `gemcut chat` saves (one
// conversation without branches), which the page also writes, so that `gemcut chat --load` goes on with it.

import { addMessage, newConversation, newId, path, titleOf } from "./conversation.js";

export const MAX_BYTES = 64 * 1024 * 1024;
const MAX_CONVERSATIONS = 10_000;
const MAX_MESSAGES = 20_000;
const MAX_TEXT = 4_000_000;
const FORMAT = "gemcut-conversations";
const CHAT_FORMAT = "gemcut-chat";
const FINISHES = ["stop", "length", "stopped", "cut", "content_filter", "error"];

/** A file's text for all these conversations. */
export function pageFile(conversations) {
  return `${JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1)}\n`;
}

/** The file of `gemcut chat --load` for the path that is shown: whole exchanges only. */
export function chatFile(conversation, model) {
  const messages = path(conversation).map(({ role, text }) => ({ role, content: text }));
  const whole = [];
  for (let i = 0; i + 1 < messages.length; i += 2) {
    if (messages[i].role !== "user" || messages[i + 1].role !== "assistant" || !messages[i + 1].content) break;
    whole.push(messages[i], messages[i + 1]);
  }
  const data = { format: CHAT_FORMAT, version: 1, model, system: conversation.system, messages: whole };
  return `${JSON.stringify(data, null, 2)}\n`;
}

/** A name for a file that every system takes. */
export function fileName(title) {
  const plain = title.normalize("NFKD").replace(/[^\w -]+/g, "").trim().replace(/[\s_]+/g, "-").toLowerCase();
  return `${plain.slice(0, 50) || "conversation"}.json`;
}

/** The conversations of a file's text, made anew: fresh ids, known fields only. Throws Error with one clear line. */
export function parseImport(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; choose one that this page or gemcut chat has written.");
  }
  if (Array.isArray(data)) data = { format: CHAT_FORMAT, version: 1, system: "", messages: data };
  if (!isObject(data) || data.version !== 1 || ![FORMAT, CHAT_FORMAT].includes(data.format)) {
    throw new Error("The file holds no conversations; choose one that this page or gemcut chat has written.");
  }
  if (data.format === CHAT_FORMAT) return [importChat(data)];
  const list = data.conversations;
  if (!Array.isArray(list)) throw new Error("The file has no list of conversations.");
  if (list.length > MAX_CONVERSATIONS) {
    throw new Error(`The file has ${list.length} conversations; at most ${MAX_CONVERSATIONS} are read.`);
  }
  return list.map((one, i) => importConversation(one, `Conversation ${i + 1}`));
}

function importConversation(data, where) {
  if (!isObject(data)) throw new Error(`${where} is not an object.`);
  const made = newConversation();
  made.title = string(data.title, 500, `${where}: title`).replace(/\s+/g, " ").trim();
  made.system = string(data.system ?? "", MAX_TEXT, `${where}: system`);
  made.created = time(data.created);
  made.updated = time(data.updated);
  if (!Array.isArray(data.messages) || data.messages.length > MAX_MESSAGES) {
    throw new Error(`${where}: messages must be a list of at most ${MAX_MESSAGES}.`);
  }
  const fresh = new Map([[null, null]]); // the file's ids, and ours
  data.messages.forEach((message, i) => {
    const place = `${where}, message ${i + 1}`;
    const { id, parent, role } = isObject(message) ? message : {};
    if (typeof id !== "string" || id.length > 100 || fresh.has(id)) throw new Error(`${place}: bad or repeated id.`);
    if (parent !== null && typeof parent !== "string") throw new Error(`${place}: bad parent.`);
    if (!fresh.has(parent)) throw new Error(`${place}: its parent does not stand before it.`);
    if (role !== "user" && role !== "assistant") throw new Error(`${place}: role must be user or assistant.`);
    if (parent === null && role !== "user") throw new Error(`${place}: a conversation begins with the user.`);
    fresh.set(id, newId());
    made.messages.push({
      id: fresh.get(id),
      parent: fresh.get(parent),
      role,
      text: string(message.text, MAX_TEXT, `${place}: text`),
      at: time(message.at),
      model: string(message.model ?? "", 300, `${place}: model`),
      finish: FINISHES.includes(message.finish) ? message.finish : "cut",
      stats: importStats(message.stats),
    });
  });
  const leaf = typeof data.leaf === "string" ? fresh.get(data.leaf) : null;
  made.leaf = leaf || (made.messages.length ? made.messages[made.messages.length - 1].id : null);
  if (!made.title) made.title = made.messages.length ? titleOf(made.messages[0].text) : "Untitled";
  return made;
}

function importChat(data) {
  const made = newConversation();
  made.system = string(data.system ?? "", MAX_TEXT, "system");
  if (!Array.isArray(data.messages) || data.messages.length > MAX_MESSAGES) {
    throw new Error(`The file's messages must be a list of at most ${MAX_MESSAGES}.`);
  }
  data.messages.forEach((message, i) => {
    const { role, content } = isObject(message) ? message : {};
    const text = string(content, MAX_TEXT, `Message ${i + 1}: content`);
    if (role === "system" && i === 0) {
      made.system = made.system ? `${made.system}\n\n${text}` : text;
      return;
    }
    const wanted = made.messages.length % 2 ? "assistant" : "user";
    if (role !== wanted) throw new Error(`Message ${i + 1}: role must be ${wanted}, since user and assistant take turns.`);
    const added = addMessage(made, made.leaf, role, text);
    added.finish = "stop";
  });
  if (!made.title) made.title = "Untitled";
  return made;
}

function importStats(stats) {
  if (!isObject(stats)) return null;
  const number = (value) => (Number.isFinite(value) && value >= 0 ? value : 0);
  return { prompt: number(stats.prompt), completion: number(stats.completion), speed: number(stats.speed) };
}

function string(value, most, where) {
  if (typeof value !== "string") throw new Error(`${where} must be a text.`);
  if (value.length > most) throw new Error(`${where} has ${value.length} characters; at most ${most} are read.`);
  return value.toWellFormed ? value.toWellFormed() : value;
}

function time(value) {
  const now = Date.now();
  return Number.isFinite(value) && value > 0 && value <= now ? value : now;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
