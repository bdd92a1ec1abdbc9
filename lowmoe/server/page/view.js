// What components are written with: preact, and its templates without a build step.

import { Component, h, render } from "/page/vendor/preact.mjs";
import htm from "/page/vendor/htm.mjs";

export const html = htm.bind(h);
export { Component, render };

/** Icons, 20 x 20, drawn in lines. */
const PATHS = {
  add: "M10 4v12M4 10h12",
  again: "M15.5 10a5.5 5.5 0 1 1-1.7-4M15.5 3.2v3.2h-3.2",
  close: "M5 5l10 10M15 5L5 15",
  copy: "M7.5 7.5h8v8h-8zM12.5 7.5v-3h-8v8h3",
  edit: "M4.5 15.5l.7-3.2 7.6-7.6a1.6 1.6 0 0 1 2.4 2.4l-7.6 7.6z",
  machine: "M4 4h3.5v3.5H4zM12.5 4H16v3.5h-3.5zM4 12.5h3.5V16H4zM12.5 12.5H16V16h-3.5zM8.3 8.3h3.4v3.4H8.3z",
  moon: "M15.8 11.6A6.2 6.2 0 1 1 8.4 4.2a5 5 0 0 0 7.4 7.4z",
  options: "M4 6.5h6.5M14.5 6.5H16M4 13.5h1.5M9.5 13.5H16M10.5 6.5a2 2 0 1 0 4 0a2 2 0 1 0-4 0M5.5 13.5a2 2 0 1 0 4 0a2 2 0 1 0-4 0",
  send: "M10 16V4.5M5 9.2l5-4.9 5 4.9",
  stop: "M6 6h8v8H6z",
  sun: "M10 7a3 3 0 1 0 0 6a3 3 0 1 0 0-6M10 2.5v1.6M10 15.9v1.6M2.5 10h1.6M15.9 10h1.6M4.7 4.7l1.1 1.1M14.2 14.2l1.1 1.1M15.3 4.7l-1.1 1.1M5.8 14.2l-1.1 1.1",
  system: "M4 4.5h12v8.5H4zM7.5 16h5M10 13v3",
};

export const icon = (name) => html`
  <svg class="icon" viewBox="0 0 20 20" width="20" height="20" aria-hidden="true"><path d=${PATHS[name]} /></svg>
`;

/** A button that is an icon; `label` says to everybody what it does. */
export const iconButton = ({ name, label, onClick, ...rest }) => html`
  <button type="button" class="icon-button" aria-label=${label} title=${label} onClick=${onClick} ...${rest}>
    ${icon(name)}
  </button>
`;

/** Runs `show` at the next frame, once, however often it is asked for. */
export function atNextFrame(show) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      show();
    });
  };
}
