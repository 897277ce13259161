// Small values that this browser keeps. Where storage is closed they are simply not kept.

export function remembered(key, storage = "localStorage") {
  try {
    return window[storage].getItem(key) || "";
  } catch {
    return "";
  }
}

/** Keep a text; "" forgets. */
export function remember(key, text, storage = "localStorage") {
  try {
    if (text) window[storage].setItem(key, text);
    else window[storage].removeItem(key);
  } catch {
    // it lasts as long as the page
  }
}
