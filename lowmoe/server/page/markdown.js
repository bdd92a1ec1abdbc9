// Markdown to nodes of this page.  What a model writes is untrusted.
//
// Knows:        what of markdown is shown, what of HTML may be.
// Ignorant of:  where it comes from.

import { Marked } from "/page/vendor/marked.mjs";
import DOMPurify from "/page/vendor/dompurify.mjs";

const TAGS = (
  "p br hr strong em del b i u s sub sup kbd code pre ul ol li blockquote h3 h4 h5 h6 " +
  "table thead tbody tr th td a"
).split(" ");
const marked = new Marked({
  gfm: true,
  renderer: {
    // Below the headings of the page.
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    // An image's address would tell its server that the answer was read: it becomes a link.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    html: ({ text }) => escaped(text), // shown as what it is, not as what it would do
  },
});

function escaped(text) {
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (c) => names[c]);
}

/** A text in pieces that are shown one below the other; only the last changes as it grows. */
export function blocks(text) {
  return marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
}

/** A piece as a fragment, cleaned; no text becomes markup in any other way. */
export function nodes(block) {
  const fragment = DOMPurify.sanitize(marked.parser([block]), {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "title", "align", "start"],
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
  for (const wide of fragment.querySelectorAll("pre, table")) {
    wide.replaceWith(scrolling(wide));
  }
  return fragment;
}

/** Wide things scroll by themselves; code can be copied. */
function scrolling(wide) {
  const frame = document.createElement("div");
  const scroller = document.createElement("div");
  scroller.className = "scroller";
  scroller.tabIndex = 0;
  scroller.setAttribute("role", "region");
  scroller.setAttribute("aria-label", wide.tagName === "PRE" ? "Code" : "Table");
  scroller.append(wide.cloneNode(true));
  frame.append(scroller);
  frame.className = wide.tagName === "PRE" ? "code" : "table";
  if (wide.tagName === "PRE") {
    const copy = document.createElement("button");
    copy.type = "button";
    copy.className = "copy";
    copy.textContent = "Copy";
    copy.addEventListener("click", () => copied(copy, wide.textContent));
    frame.prepend(copy);
  }
  return frame;
}

/** Copy, and say so on the button for a moment. */
export async function copied(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}
