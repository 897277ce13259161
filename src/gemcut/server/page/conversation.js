// A conversation: a tree of messages, of which one path is shown. Plain data and functions, no document, no storage.
//
// {id, title, system, created, updated, leaf, messages: [{id, parent, role, text, at, model, finish, stats}]}
// A message's parent stands before it in the list. To edit or try again adds a sibling, so nothing is lost; `leaf` is
// the end of the path that is shown (null: the path is empty). `finish`: "" while it is written, else stop, length,
// stopped (by the person), cut (the page was left, or the connection), content_filter (by a guard), error. `request`: the
// server's name for the answer, for reports; absent where it came from elsewhere.

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", system: "", created: now, updated: now, leaf: null, messages: [] };
}

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Add a message below `parent` (an id or null) and show it. */
export function addMessage(conversation, parent, role, text) {
  const message = { id: newId(), parent, role, text, at: Date.now(), model: "", finish: "", stats: null };
  conversation.messages.push(message);
  conversation.leaf = message.id;
  if (!conversation.title && role === "user") conversation.title = titleOf(text);
  touch(conversation);
  return message;
}

export function touch(conversation) {
  conversation.updated = Date.now();
}

export function findMessage(conversation, id) {
  return conversation.messages.find((message) => message.id === id) || null;
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const shown = [];
  for (let at = byId.get(conversation.leaf); at; at = byId.get(at.parent)) shown.push(at);
  return shown.reverse();
}

/** The messages that answer the same message as this one, itself among them, oldest first. */
export function siblings(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent && other.role === message.role);
}

/** Show the path through `message`, down to the newest message below it. */
export function show(conversation, message) {
  let leaf = message;
  for (let next = newestChild(conversation, leaf); next; next = newestChild(conversation, leaf)) leaf = next;
  conversation.leaf = leaf.id;
}

function newestChild(conversation, message) {
  return conversation.messages.findLast((other) => other.parent === message.id) || null;
}

/** Take a message and all below it away; what was above it is shown. */
export function removeMessage(conversation, message) {
  const gone = new Set([message.id]);
  for (const other of conversation.messages) if (gone.has(other.parent)) gone.add(other.id);
  conversation.messages = conversation.messages.filter((other) => !gone.has(other.id));
  if (gone.has(conversation.leaf)) {
    const rest = siblings(conversation, message);
    if (rest.length) show(conversation, rest[rest.length - 1]);
    else conversation.leaf = message.parent;
  }
  touch(conversation);
}

/** What the server is sent: roles in turn, no empty text. Two messages of one role in a row become one. */
export function toMessages(conversation, upTo) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system.trim() });
  for (const { id, role, text } of path(conversation)) {
    const last = messages[messages.length - 1];
    if (text && last && last.role === role) last.content += `\n\n${text}`;
    else if (text) messages.push({ role, content: text });
    if (id === upTo) break;
  }
  return messages;
}

/** The shown texts as one, for a model that continues texts: an answer follows its question at once. */
export function toText(conversation, upTo) {
  let whole = conversation.system.trim();
  for (const { id, role, text } of path(conversation)) {
    whole += role === "user" && whole ? `\n${text}` : text;
    if (id === upTo) break;
  }
  return whole;
}

/** A short title from the first message. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ").replace(/^[#>*\s`-]+/, "");
  return [...line].length > 60 ? `${[...line].slice(0, 59).join("")}…` : line || "Untitled";
}

/** Whether every word of `query` is in the title, the instructions or a message; the case does not matter. */
export function matches(conversation, query) {
  const wanted = query.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = [conversation.title, conversation.system, ...conversation.messages.map(({ text }) => text)];
  const whole = texts.join("\n").toLowerCase();
  return wanted.every((word) => whole.includes(word));
}
