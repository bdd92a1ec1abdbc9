// Server-sent events from a response: EventSource can neither POST nor send a key.
//
// Knows:        the lines of the format.
// Ignorant of:  what they say.

// The server breaks every silence of 5 s. A connection that is silent for so long is gone, though
// nobody may have said so: a machine that was put to sleep, a network that was changed.
const GONE_AFTER_MS = 30000;

/**
 * Events as {event, data}; ends when the connection does, a half event is dropped.
 * Throws what reading throws, and an error for a connection that has gone silent.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await inTime(reader.read());
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          [event, data] = ["message", []];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line.startsWith("event:")) {
          event = line.slice(6).trim();
        } // else a comment: the server is there
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function inTime(reading) {
  let timer;
  const silence = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Error("silent")), GONE_AFTER_MS);
  });
  try {
    return await Promise.race([reading, silence]);
  } finally {
    clearTimeout(timer);
  }
}
