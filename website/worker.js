// A page opened from a disk may start no worker, so the search runs in a hidden frame there.
if (location.protocol === "file:") window.IFrameWorker = window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.documentElement.append(frame);
    const inside = frame.contentWindow;
    inside.postMessage = data => {
      const event = new MessageEvent("message", {data});
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    };
    const load = address => new Promise(resolve => {
      const script = frame.contentDocument.createElement("script");
      script.src = new URL(address, url).href;
      script.onload = script.onerror = resolve;
      frame.contentDocument.documentElement.append(script);
    });
    inside.importScripts = (...all) => all.reduce((done, one) => done.then(() => load(one)), Promise.resolve());
    this.inside = inside;
    this.ready = load(url);
  }
  postMessage(data) {
    this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", {data})));
  }
  terminate() {}
};
