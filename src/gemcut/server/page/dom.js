// Making elements: the only ways this page puts anything into the document. Texts are always text, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `options`: attributes, and `on` (event listeners); `children`: elements and texts. */
export function h(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}

/** One of the symbols that index.html holds; said by nobody, since the button has a name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a symbol; `label` is what a screen reader says, and with `text` what stands beside the symbol. */
export function button(symbol, label, click, options = {}) {
  const { text = false, ...rest } = options;
  const made = h("button", { type: "button", title: label, ...rest, on: { click } }, icon(symbol));
  if (text) made.append(h("span", {}, label));
  else made.setAttribute("aria-label", label);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Put a text on the clipboard; whether that went well. Without https the modern way is closed to pages. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { "aria-hidden": "true", class: "sr-only" });
    area.value = text;
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (before instanceof HTMLElement) before.focus();
    return done;
  }
}

/** Offer a text as a file to keep. */
export function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Say something to a screen reader, once. */
export function announce(text) {
  const place = byId("status");
  place.textContent = "";
  setTimeout(() => {
    place.textContent = text;
  }, 50);
}
