// Conversations kept in this browser (IndexedDB), and nowhere else. Other tabs are told of changes.

const DATABASE = "gemcut";
const TABLE = "conversations";

export class Store {
  constructor() {
    this.database = null;
    this.memory = new Map(); // everything by id; the only place where the browser keeps nothing
    this.persistent = false;
    this.onchange = () => {};
    this.channel = "BroadcastChannel" in window ? new BroadcastChannel("gemcut-conversations") : null;
  }

  /** Read all conversations. Private windows may refuse; then they last as long as the page. */
  async open() {
    try {
      this.database = await opened(indexedDB.open(DATABASE, 1));
      this.database.onversionchange = () => this.database.close();
      const all = await finished(this.database.transaction(TABLE).objectStore(TABLE).getAll());
      for (const conversation of all) this.memory.set(conversation.id, conversation);
      this.persistent = true;
    } catch (error) {
      console.warn("conversations are not kept:", error);
    }
    if (this.channel) this.channel.onmessage = ({ data }) => this.reread(data);
  }

  /** All conversations, the one that changed last first. */
  all() {
    return [...this.memory.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.memory.get(id) || null;
  }

  async save(conversation) {
    this.memory.set(conversation.id, conversation);
    await this.write((table) => table.put(conversation));
    this.tell(conversation.id);
  }

  async saveAll(conversations) {
    for (const conversation of conversations) this.memory.set(conversation.id, conversation);
    await this.write((table) => conversations.forEach((conversation) => table.put(conversation)));
    for (const { id } of conversations) this.tell(id);
  }

  async remove(id) {
    this.memory.delete(id);
    await this.write((table) => table.delete(id));
    this.tell(id);
  }

  async write(change) {
    if (!this.persistent) return;
    const transaction = this.database.transaction(TABLE, "readwrite");
    change(transaction.objectStore(TABLE));
    // At once: a page that is being left does not hear that this was written, and would not say that it is all.
    transaction.commit();
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = transaction.onerror = () => reject(transaction.error || new Error("not written"));
    });
  }

  tell(id) {
    if (this.channel && this.persistent) this.channel.postMessage(id);
  }

  async reread(id) {
    if (typeof id !== "string" || !this.persistent) return;
    const found = await finished(this.database.transaction(TABLE).objectStore(TABLE).get(id));
    if (found) this.memory.set(id, found);
    else this.memory.delete(id);
    this.onchange(id);
  }
}

function opened(request) {
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return finished(request);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version"));
  });
}
