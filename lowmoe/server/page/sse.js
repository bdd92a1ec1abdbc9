// Server-sent events from a response: EventSource can neither POST nor send a key.
//
// Knows:        the lines of the format.
// Ignorant of:  what they say.

/** Events as {event, data}; ends when the connection does, a half event is dropped. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
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
