// Conversations out of and into files, with what is said about it.

import { download } from "./dom.js";
import { toast } from "./toasts.js";
import { chatFile, fileName, MAX_BYTES, pageFile, parseImport } from "./transfer.js";

/** All conversations with their branches, in one file. */
export function exportAll(conversations) {
  if (!conversations.length) toast("There are no conversations yet.");
  else download(`gemcut-conversations-${new Date().toISOString().slice(0, 10)}.json`, pageFile(conversations));
}

/** The shown path of one conversation, as `gemcut chat --load` takes it. */
export function exportChat(conversation, model) {
  if (conversation) download(fileName(conversation.title), chatFile(conversation, model));
}

/** Read the file that was chosen in `input` into the store, whole or not at all. `done(one)`: see `App.imported`. */
export async function importFile(input, store, done) {
  const [file] = input.files;
  input.value = ""; // the same file may be chosen again
  if (!file) return;
  try {
    if (file.size > MAX_BYTES) throw new Error(`The file has ${file.size} bytes; at most ${MAX_BYTES} are read.`);
    const conversations = parseImport(await file.text());
    await store.saveAll(conversations);
    const count = conversations.length;
    done(count === 1 ? conversations[0] : null);
    toast(`${count} conversation${count === 1 ? " was" : "s were"} imported.`);
  } catch (error) {
    toast(`Nothing was imported. ${error.message}`, { error: true });
  }
}
