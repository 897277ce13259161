// One answer: wait for the server, ask, take the pieces, count, stop.

import { streamAnswer } from "./api.js";

const SPEED_WINDOW = 3000; // milliseconds that the live speed looks back

/** The writing of one answer into a message. At most one runs at a time. */
export class Answer {
  /**
   * `message` is the assistant's; `body()` is the request for it. `ready()` resolves when the server is ready.
   * `on`: changed(), waiting(text).
   */
  constructor(conversation, message, body, ready, on) {
    Object.assign(this, { conversation, message, body, ready, on });
    this.controller = new AbortController();
    this.tokens = 0;
    this.times = [];
  }

  stop() {
    this.controller.abort();
  }

  /** Write it. Resolves when it has ended; `message.finish` says how. Throws ApiFailure where it went wrong. */
  async run() {
    const { message, controller } = this;
    const { signal } = controller;
    message.finish = "";
    try {
      await this.whenReady(signal);
      this.on.waiting("Reading the prompt…");
      await streamAnswer(
        this.body(),
        {
          text: (piece) => this.piece(piece),
          progress: (done, all) => this.on.waiting(`Reading the prompt: ${done} of ${all} tokens`),
          finish: (reason) => {
            message.finish = ["length", "content_filter"].includes(reason) ? reason : "stop";
          },
          named: (id) => (message.request = id.slice(0, 200)),
          refusal: (text) => this.piece(message.text ? `\n\n${text}` : text),
          usage: (usage) => this.usage(usage),
        },
        signal,
      );
      message.finish ||= "stop";
    } catch (error) {
      message.finish = error.name === "AbortError" ? "stopped" : "error";
      if (error.name !== "AbortError") throw error;
    }
  }

  async whenReady(signal) {
    this.on.waiting("Waiting for the server…");
    await new Promise((resolve, reject) => {
      const left = () => reject(new DOMException("stopped", "AbortError"));
      if (signal.aborted) left();
      signal.addEventListener("abort", left, { once: true });
      this.ready().then(resolve, reject);
    });
  }

  piece(text) {
    const now = performance.now();
    this.message.text += text;
    this.tokens += 1;
    this.times.push(now);
    while (this.times[0] < now - SPEED_WINDOW) this.times.shift();
    this.on.changed();
  }

  /** Tokens a second over the last moments; 0 before there are any. */
  speed() {
    const { times } = this;
    const seconds = times.length > 1 ? (times[times.length - 1] - times[0]) / 1000 : 0;
    return seconds > 0 ? (times.length - 1) / seconds : 0;
  }

  usage({ prompt_tokens: prompt, completion_tokens: completion, timings }) {
    const whole = (value) => (Number.isFinite(value) && value >= 0 ? value : 0);
    this.message.stats = {
      prompt: whole(prompt),
      completion: whole(completion),
      speed: whole(timings?.predicted_per_second) || this.speed(),
    };
  }
}
