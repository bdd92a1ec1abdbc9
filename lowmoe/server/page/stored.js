// What a browser keeps for this page, where it keeps anything: it may be told not to, or be full.
//
// Knows:        that storage may throw, even when it is only looked at.
// Ignorant of:  what is kept.

const kind = (name) => ({
  /** What is kept by this name, or undefined. */
  get(key) {
    try {
      return globalThis[name].getItem(key) ?? undefined;
    } catch {
      return undefined;
    }
  },
  /** Keep a text, or with undefined nothing more; false if that cannot be. */
  set(key, text) {
    try {
      if (text === undefined) globalThis[name].removeItem(key);
      else globalThis[name].setItem(key, text);
      return true;
    } catch {
      return false;
    }
  },
});

/** Over a reload. */
export const session = kind("sessionStorage");
/** For good. */
export const local = kind("localStorage");
