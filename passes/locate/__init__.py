"""In: a `Capture`. Out: `LocatedSites`, each region bound to the live modules or recorded nodes that compute it."""
