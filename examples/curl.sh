#!/bin/sh
# What a buyer does, with nothing but curl: look, ask the price, buy, stream, see the money.
#   examples/curl.sh DOCUMENT [QUESTION]
# The server and the key come from KVMARKET_URL and KVMARKET_KEY.
set -eu
url=${KVMARKET_URL:-http://localhost:8000}
document=$1
question=${2:-What is this about?}

ask() {
  curl --silent --show-error --fail-with-body --no-buffer \
    --header "Authorization: Bearer $KVMARKET_KEY" --header 'Content-Type: application/json' "$@"
  echo
}

body() {
  cat <<JSON
{"prompt": "\n\nQ: $question\nA:", "max_tokens": 16, "temperature": 0, "stream": $1,
 "kvmarket": {"document": "$document", "reuse": "require"}}
JSON
}

echo '# The document'
ask "$url/v1/kvmarket/documents/$document"
echo '# Its price'
ask "$url/v1/kvmarket/quotes" --data "{\"document\": \"$document\"}"
echo '# An answer'
ask "$url/v1/completions" --data "$(body false)"
echo '# An answer as a stream, with its receipt at the end'
ask "$url/v1/completions" --data "$(body true)"
echo '# The account'
ask "$url/v1/kvmarket/accounts/me"
