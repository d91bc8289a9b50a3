// Search runs in a Worker, which browsers refuse to pages that are opened from a disk. There, a hidden frame does the same:
// what it posts reaches the page, and the other way about.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.body.appendChild(document.createElement("iframe"))
      frame.hidden = true
      this.inner = frame.contentWindow
      this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = new Promise((loaded, failed) => {
        const script = this.inner.document.createElement("script")
        Object.assign(script, { src: url, onload: loaded, onerror: failed })
        this.inner.document.body.append(script)
      })
    }

    postMessage(data) {
      this.loaded.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
