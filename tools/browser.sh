#!/bin/sh
# A Chromium for the test that clicks on the demo's page: says which one is there, installs Debian's where root may, or says
# what to install. It always succeeds: without a browser that test is skipped and says so.
set -u

here() {
    for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
        command -v "$name" && return
    done
    return 1
}

if found=$(here); then
    echo "browser: $found"
elif ! command -v apt-get >/dev/null; then
    echo "browser: none; install Chromium or Chrome for the test of the demo's page"
elif [ "$(id -u)" != 0 ]; then
    echo "browser: none; as root, apt-get install chromium, for the test of the demo's page"
else
    log=$(mktemp)
    if { timeout 300 apt-get update && timeout 900 env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends chromium; } >"$log" 2>&1 && found=$(here); then
        echo "browser: $found, installed"
    else
        echo "browser: apt-get could not install chromium, so the test of the demo's page is skipped: $(tail -n 1 "$log")"
    fi
    rm -f "$log"
fi
