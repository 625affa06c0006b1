# Sourced by .ci/run and by tests/architecture.

# Print the fenced code block that follows `<!-- MARKER -->` in a Markdown file; fail if there is none.
# Usage: readme_command FILE MARKER
readme_command() {
    awk -v marker="<!-- $2 -->" '
        index($0, marker) { found = 1; next }
        found && /^```/ { if (inside) { closed = 1; exit } inside = 1; next }
        inside { print }
        END { if (!closed) exit 1 }
    ' "$1" || { echo "no code block after <!-- $2 --> in $1" >&2; return 1; }
}
