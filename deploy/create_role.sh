#!/bin/sh
# Runs once, when PostgreSQL makes its database: the role that engines use.
set -eu
psql --set=ON_ERROR_STOP=1 --set=password="$KVMARKET_PASSWORD" --username="$POSTGRES_USER" \
  --dbname="$POSTGRES_DB" <<'SQL'
CREATE ROLE kvmarket LOGIN PASSWORD :'password';
SQL
